"""What goes into an engine and what comes out. The engine knows no task, no reward, no text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tinylora.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to draw tokens. temperature 0 is greedy; log-probs are then those at temperature 1."""

    temperature: float = 1.0
    max_new_tokens: int = 64
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise UserError(f"temperature must be a finite number, 0 (greedy) or more, got {self.temperature}")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed must be at least 0 and below 2**64, got {self.seed}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to complete `num_samples` times.

    `key` names the request in the random draws: draw(params.seed, key, sample, position), so a completion does not
    depend on what else is in the batch. `v` is the adapter vector, (groups, u) float32; None is the base model.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    num_samples: int = 1
    key: int = 0
    v: Tensor | None = None
    should_stop: Callable[[list[int]], bool] | None = None
    forced_ids: tuple[int, ...] = ()
    """Tokens to take instead of drawing, one a position; their log-probs are reported. For probes and for scoring."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One sampled completion; the stop token, if one was drawn, is the last of `token_ids`."""

    request_index: int
    sample_index: int
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[float, ...]
    """log-probability of each token under the model at the run's temperature: what the learner computes too."""
    sampling_logprobs: tuple[float, ...]
    """log-probability under the distribution really drawn from; differs if a sampler does more than temperature."""
