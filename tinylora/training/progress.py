"""The one line a step that a person watches. Plain lines to stderr, on a terminal and off it: nothing moves."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from tinylora.talk import format_duration, harmless


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one step's line shows. Every mean is over the whole step."""

    step: int
    """Steps done, this one included: 1 after the first."""
    reward: float | None
    """Mean reward of the sampled completions; None where nothing was sampled."""
    length_tokens: float | None
    """Mean completion length, stop token included."""
    tokens_per_second: float | None
    """Tokens sampled in this step divided by the seconds that sampling took."""
    loss: float | None = None
    """Mean negative log-probability a token, of a supervised step."""
    noise_p: float | None = None
    """How often chance alone gives a gradient as large; None where nobody asked."""
    v_norm: float
    """Euclidean norm of v after the step."""
    grad_norm: float
    """Euclidean norm of the gradient of v, before clipping."""
    step_seconds: float
    """Wall time of this step, without validation and checkpoints."""


def format_step(report: StepReport, total_steps: int, seconds_left: float) -> str:
    """One line, such as (in one piece):

    step  10/200 | reward 0.62 | length 214 tok | 1,840 tok/s | |v| 0.031 | grad norm 3.1e-02 | 12.4 s/step
    | 39 min left
    """
    width = len(str(total_steps))
    supervised = () if report.loss is None else (f"loss {_fixed(report.loss, 3)}",)
    sampled: tuple[str, ...] = ()
    if report.reward is not None and report.length_tokens is not None and report.tokens_per_second is not None:
        sampled = (
            f"reward {_fixed(report.reward, 2)}",
            f"length {_fixed(report.length_tokens, 0)} tok",
            f"{_fixed(report.tokens_per_second, 0)} tok/s",
        )
    return " | ".join(
        (
            f"step {report.step:>{width}}/{total_steps}",
            *supervised,
            *sampled,
            f"|v| {_fixed(report.v_norm, 3) if report.v_norm >= 0.0095 else f'{report.v_norm:.1e}'}",
            f"grad norm {report.grad_norm:.1e}",
            *(() if report.noise_p is None else (f"noise p {_fixed(report.noise_p, 3)}",)),
            f"{_fixed(report.step_seconds, 1)} s/step",
            f"{format_duration(seconds_left)} left",
        )
    )


def _fixed(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else "n/a"


class Progress:
    """Prints a line a step and estimates the time left from the last few steps, validation and checkpoints included.

    `done_steps` is where a resumed run starts, so that its first estimate counts only what is left.
    """

    def __init__(
        self,
        total_steps: int,
        done_steps: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._stream = stream
        self._clock = clock
        # Eleven instants are ten intervals: long enough to hold a validation run, short enough to follow a change.
        self._instants: deque[tuple[int, float]] = deque([(done_steps, clock())], maxlen=11)

    def step(self, report: StepReport) -> None:
        """Print the line of one finished step."""
        self._instants.append((report.step, self._clock()))
        (first_step, first), (last_step, last) = self._instants[0], self._instants[-1]
        per_step = (last - first) / (last_step - first_step) if last_step > first_step else math.nan
        self.say(format_step(report, self._total_steps, per_step * (self._total_steps - report.step)))

    def say(self, text: str) -> None:
        """Print one line of talk. sys.stderr is looked up now: it may have been replaced since this object was made."""
        print(harmless(text), file=self._stream or sys.stderr, flush=True)
