"""The metrics stream: one JSON object a step, in a file that stays readable after a kill, and a fan-out to trackers.

`metrics.jsonl` is the truth; trackers (see `trackers.py`) are copies of it. Knows no training and no torch.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from tinylora.system.jsonl import JsonlWriter

logger = logging.getLogger("tinylora")


class Means:
    """Metrics of one step as sums and counts: a reported value is its whole sum divided by its whole count.

    >>> means = Means()
    >>> means.add("reward", 3.0, count=4)
    >>> means.add("reward", 1.0, count=1)
    >>> means.result()
    {'reward': 0.8}
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(self, name: str, total: float, count: float = 1) -> None:
        """Add `total`, the sum of `count` values; means of means (unequal micro-batches) cannot come about."""
        self._sums[name] = self._sums.get(name, 0.0) + float(total)
        self._counts[name] = self._counts.get(name, 0.0) + float(count)

    def count(self, name: str) -> float:
        """How many values were added under the name."""
        return self._counts.get(name, 0.0)

    def with_more(self, other: "Means") -> "Means":
        """What both have counted."""
        both = Means()
        for one in (self, other):
            for name, total in one._sums.items():
                both.add(name, total, one._counts[name])
        return both

    def result(self) -> dict[str, float]:
        """Name to mean, in the order first added; NaN (null in the file) where nothing was counted."""
        return {name: self._sums[name] / n if (n := self._counts[name]) else math.nan for name in self._sums}


class Tracker(Protocol):
    """A place that shows a run's numbers as they come: TensorBoard, W&B, Trackio, or your own."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take one step's numbers. Only numbers come here, NaN among them where a mean had no items."""
        ...

    def close(self) -> None:
        """Finish: called once, also after Ctrl-C."""
        ...


class MetricsWriter:
    """One JSON object a step into `path`, then the same numbers to every tracker.

    A tracker that raises (its server is away) is dropped with a warning: the file is the truth, and the run goes on.
    """

    def __init__(self, path: Path, trackers: Sequence[Tracker] = ()) -> None:
        self._file = JsonlWriter(path)
        self._trackers = list(trackers)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write {"step": step, **metrics}. Raises: UserError if there is no room."""
        self._file.append({"step": step, **metrics})
        numbers = {name: number for name, value in metrics.items() if (number := _as_number(value)) is not None}
        for tracker in list(self._trackers):
            try:
                tracker.log(step, numbers)
            except Exception as error:
                self._trackers.remove(tracker)
                self._drop(tracker, f"log step {step}", error)

    def close(self) -> None:
        """Close the file and every tracker."""
        self._file.close()
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:
                self._drop(tracker, "close", error)
        self._trackers = []

    def _drop(self, tracker: Tracker, what: str, error: Exception) -> None:
        name = type(tracker).__name__
        logger.warning("%s could not %s (%s: %s) and is left out from here on; %s holds everything",
                       name, what, type(error).__name__, error, self._file.path)  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _as_number(value: Any) -> float | None:
    """A float for numbers and one-element tensors, None for text, lists and null, which trackers do not draw."""
    if isinstance(value, (int, float)):
        return float(value)
    if hasattr(value, "item") and getattr(value, "size", None) is not None:
        return float(value.item())
    return None
