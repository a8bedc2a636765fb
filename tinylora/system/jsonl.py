"""JSON lines in a file that stays readable after a kill: one object a line, a torn last line left out."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tinylora.errors import UserError
from tinylora.system.failures import writing
from tinylora.system.files import open_to_append, write_all
from tinylora.system.reading import MOST_DATA_BYTES, read_bytes
from tinylora.system.strict_json import parse_json

GO_ON = "go on with: tinylora train --resume RUN"
"""What to do with a run that a full disk has ended, once there is room."""


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
        with self._in_words():
            self._fd = open_to_append(path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line. Raises: UserError if there is no room for it; TypeError if JSON cannot hold it."""
        line = json.dumps(finite_json(record), ensure_ascii=False, allow_nan=False) + "\n"
        # Sampled text can hold half of a surrogate pair, which UTF-8 refuses: written as ? rather than ending the run.
        data = line.encode("utf-8", errors="replace")
        size = os.fstat(self._fd).st_size
        with self._in_words():
            try:
                write_all(self._fd, data)
            except OSError:
                os.ftruncate(self._fd, size)
                raise

    def _in_words(self) -> AbstractContextManager[None]:
        return writing(self.path, again=GO_ON)

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

    Raises: UserError for a broken line anywhere else, with its number, and for what is no file, such as a FIFO, which
    would be waited for; a missing file reads as no lines.
    """
    if not path.exists():
        return []
    lines = read_bytes(path, "mend it, or remove it", MOST_DATA_BYTES).split(b"\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or a torn line
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}); mend or remove that line") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} must be a JSON object, got {type(record).__name__}")
        records.append(record)
    return records
