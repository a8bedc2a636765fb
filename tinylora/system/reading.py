"""Files that people bring: regular files alone, up to a bound, as UTF-8 text with or without a byte order mark.

A device, a pipe or a folder, a file without end, another encoding, a packed file: each ends in one sentence that says
what to do. Files packed by gzip are read as what is in them.
"""

import gzip
import os
import stat
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tinylora.errors import UserError
from tinylora.talk import format_bytes, shell_line

MOST_SETTINGS_BYTES = 16 * 2**20
"""Of a recipe, a sweep, or a configuration in JSON."""
MOST_DATA_BYTES = 4 * 2**30
"""Of a file of questions or replies, unpacked."""
MOST_LINE_BYTES = 64 * 2**20

_MARK = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_PACKED = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet)",
    b"\xfd7zXZ": "packed by xz",
    b"BZh": "packed by bzip2",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"GGUF": "a GGUF model",
}
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


@contextmanager
def open_regular(path: Path, then: str) -> Iterator[IO[bytes]]:
    """The bytes of a regular file. `then` is what to do where it is none, such as "give a recipe".

    A pipe would wait for a writer, a device may have no end, so both are told by their kind and never read.
    Raises: UserError for what is no regular file, is not there, or may not be read.
    """
    try:
        found = os.stat(path)
        for is_kind, name in _KINDS:
            if is_kind(found.st_mode):
                raise UserError(f"cannot read {path}: it is {name}, not a file; {then}")
        file = open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")  # noqa: SIM115
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}; {then}") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {then}") from error
    except ValueError as error:  # a NUL in the name, or half a character
        raise UserError(f"{str(path)!r} is no file's name ({error}); {then}") from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # changed since it was looked at
            raise UserError(f"cannot read {path}: it is not a file; {then}")
        try:
            yield file
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror or error}); {then}") from error


@contextmanager
def _unpacked(path: Path, then: str, most_bytes: int) -> Iterator[tuple[IO[bytes], int]]:
    """What is in the file, behind a byte order mark, and its size, which is unknown (0) for a packed one."""
    with open_regular(path, then) as raw:
        size = os.fstat(raw.fileno()).st_size
        if size > most_bytes:
            raise _too_long(path, most_bytes, then)
        head = raw.read(2)
        raw.seek(0)
        if head != _GZIP:
            _skip_mark(raw, path)
            yield raw, size
            return
        try:
            with gzip.open(raw, "rb") as file:
                _skip_mark(file, path)
                yield file, 0  # type: ignore[misc]
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is a damaged gzip file ({error}); fetch or pack it again") from error


def _skip_mark(file: "IO[bytes] | gzip.GzipFile", path: Path) -> None:
    """Go on behind a mark of UTF-8. Raises: UserError for another encoding, and for what is no text."""
    head = file.read(8)
    file.seek(len(_MARK) if head.startswith(_MARK) else 0)
    for magic, what in _PACKED.items():
        if head.startswith(magic):
            raise UserError(f"{path} is {what}, not text; unpack or convert it first")
    wide = (head + b"\1\1")[:2]
    if wide in (b"\xff\xfe", b"\xfe\xff") or (0 in wide and any(wide)):
        again = shell_line("iconv", "-f", "UTF-16", "-t", "UTF-8", str(path))
        raise UserError(f"{path} is UTF-16 text, as Windows writes it; save it as UTF-8, such as by: {again} > NEW")


def _too_long(path: Path, most_bytes: int, then: str) -> UserError:
    return UserError(f"{path} has more than {format_bytes(most_bytes)}, which is no file of this kind; {then}")


def read_bytes(path: Path, then: str, most_bytes: int = MOST_SETTINGS_BYTES) -> bytes:
    """All of a file that is to be text, without a byte order mark. Raises: UserError as `open_regular`, and if it is
    longer, packed by something else than gzip, or UTF-16."""
    with _unpacked(path, then, most_bytes) as (file, _):
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise _too_long(path, most_bytes, then)
    return data


def read_text(path: Path, then: str, most_bytes: int = MOST_SETTINGS_BYTES) -> str:
    """All of a text file in UTF-8. Raises: UserError as `read_bytes`, and for other encodings, with the line."""
    data = read_bytes(path, then, most_bytes)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error


def read_lines(path: Path, then: str, most_bytes: int = MOST_DATA_BYTES) -> Generator[tuple[str, bytes], None, None]:
    """("file, line N", line without its end) for every line that is not blank; one at a time, so memory stays small.

    Raises: UserError as `read_bytes`, and for a line of more than MOST_LINE_BYTES.
    """
    with _unpacked(path, then, most_bytes) as (file, _):
        number, total = 0, 0
        while line := file.readline(MOST_LINE_BYTES + 1):
            number += 1
            total += len(line)
            if len(line) > MOST_LINE_BYTES:
                raise UserError(
                    f"{path}, line {number} has more than {format_bytes(MOST_LINE_BYTES)}, which no model takes; "
                    "put one object on a line"
                )
            if total > most_bytes:
                raise _too_long(path, most_bytes, then)
            if line.strip():
                yield f"{path}, line {number}", line.rstrip(b"\n")
