"""The metrics stream: one JSON object a step, in a file that stays readable after a kill, and a fan-out to trackers.

`metrics.jsonl` is the truth; trackers (see `trackers.py`) are copies of it. Knows no training and no torch.
"""

import errno
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from tinylora.errors import UserError

logger = logging.getLogger("tinylora")

# EDQUOT: over quota; EFBIG: over the process's file size limit (ulimit -f). All three end a write for want of room.
NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


@contextmanager
def no_room_is_a_user_error(path: Path, then: str = "go on with: tinylora train --resume RUN") -> Iterator[None]:
    """Turn the operating system's 'no room' errors into one sentence that names the folder; `then` is what to do next.

    Raises: UserError for a full disk, an exceeded quota or an exceeded file size limit; any other error passes through.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        folder = path if path.is_dir() else path.parent
        raise UserError(
            f"no room to write in {folder} ({os.strerror(error.errno or 0)}); what was saved before is intact: "
            f"free some space, then {then}"
        ) from error


def write_all(fd: int, data: bytes) -> None:
    """Write every byte: one `os.write` may take only a part of them (near a full disk, for one)."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def finite_json(value: Any) -> Any:
    """`value` as JSON that every parser reads: NaN and infinities become null, 0-d tensors and NumPy scalars numbers.

    Raises: TypeError for anything else that JSON has no word for.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(v) for v in value]
    if hasattr(value, "item"):  # torch and NumPy, without importing either; more than one element raises there
        return finite_json(value.item())
    raise TypeError(f"{type(value).__name__} does not fit into a JSON line: {value!r}")


class JsonlWriter:
    """Appends JSON objects to a file, one a line, each handed to the operating system before `append` returns.

    So a kill loses at most the line being written, and `read_jsonl` copes with that one. A write that fails (full disk)
    is taken back: the file ends after the last whole line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with no_room_is_a_user_error(path):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line. Raises: UserError if there is no room for it; TypeError if JSON cannot hold it."""
        line = json.dumps(finite_json(record), ensure_ascii=False, allow_nan=False) + "\n"
        # Sampled text can hold half of a surrogate pair, which UTF-8 refuses: written as ? rather than ending the run.
        data = line.encode("utf-8", errors="replace")
        size = os.fstat(self._fd).st_size
        with no_room_is_a_user_error(self.path):
            try:
                write_all(self._fd, data)
            except OSError:
                os.ftruncate(self._fd, size)
                raise

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a JSONL file. A last line without its newline (the writer was killed there) is left out.

    Raises: UserError for a broken line anywhere else, with its number; a missing file reads as no lines.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or a torn line
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}); mend or remove that line") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} must be a JSON object, got {type(record).__name__}")
        records.append(record)
    return records


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
