"""Where results go whose place a user names: a new file, an old one with --force, or a device or FIFO.

    output = Output.at(Path("replies.jsonl"), force=force)    before hours of work
    ...
    output.write(data)                                        after them

A device or FIFO is written to, not replaced; so is /dev/stdout, whatever it leads to. All else that exists is refused.
Who reads a FIFO has to be there before the work begins: nobody waits hours for a reader that does not come.
"""

import errno
import io
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tinylora.errors import UserError
from tinylora.system.failures import writing
from tinylora.system.files import kind_of, refuse_other_than_file, scratch_beside, write_all, write_atomically

_DESCRIPTORS = re.compile(r"/dev/fd|/proc/(?:self|thread-self|\d+)(?:/task/\d+)?/fd")
_MOST_LINKS = 40
READER_SECONDS = 10.0
"""How long a reader of a FIFO is waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A place that was looked at and found fit to be written to."""

    path: Path
    force: bool = False
    """Whether a file that is there is replaced."""
    is_stream: bool = False
    """A device, a FIFO, or an open descriptor of this process: it is written to as it is."""
    fifo: io.FileIO | None = None
    """A FIFO's own end, open from the start, as its reader takes a closed one for the end of the data."""

    @classmethod
    def at(cls, path: Path, *, force: bool = False) -> Self:
        """Look at a place, and make its folder; no file is made.

        Raises: UserError for a file that is there, unless `force`; for what is no file, device or FIFO; for a FIFO
        that nobody reads; for a place that cannot be written to.
        """
        with writing(path):
            if _own_descriptor(path) is not None:
                return cls(path=path, force=force, is_stream=True)
            mode = _mode(path)
            if mode is not None and (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
                if not os.access(path, os.W_OK):
                    raise UserError(f"cannot write {path} (it is {kind_of(mode)} of another user's); name another one")
                fifo = _open_fifo(path) if stat.S_ISFIFO(mode) else None
                return cls(path=path, force=force, is_stream=True, fifo=fifo)
            if mode is not None and stat.S_ISDIR(mode):
                raise UserError(f"{path} is a folder; give a file")
            if mode is not None and not stat.S_ISREG(mode):
                raise UserError(f"{path} is {kind_of(mode)}, and no file; choose another place")
            if os.path.lexists(path) and not force:
                raise UserError(f"{path} exists{_link(path)}; choose another file, or replace it with --force")
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):  # asks the file system itself, which may be read-only
                pass
        return cls(path=path, force=force)

    @classmethod
    def own(cls, path: Path) -> Self:
        """What a run or a sweep keeps in its own folder, and makes anew each time.

        Raises: UserError for what is no file: somebody else may have made the folder, and no FIFO is waited for.
        """
        with writing(path):
            refuse_other_than_file(path)
        return cls(path=path, force=True)

    def write(self, data: bytes) -> Path:
        """Write all of it, to a file whole or not at all; where it is. Raises: UserError."""
        if self.is_stream:
            self._write_stream(data)
            return self.path
        path = self._target()
        write_atomically(path, data)
        return path

    @contextmanager
    def file(self) -> Iterator[Path]:
        """A file to write to by its name; what is in it when the block ends well is the output. Raises: UserError."""
        if self.is_stream:
            with tempfile.TemporaryDirectory() as scratch:
                yield (made := Path(scratch) / "data")
                self._write_stream(made.read_bytes())
            return
        with writing(self.path), scratch_beside(self._target()) as made:
            yield made

    def _target(self) -> Path:
        """The path; if a file has come about there since it was looked at, a name beside it that is free."""
        path, number = self.path, 1
        while os.path.lexists(path) and not self.force:
            number += 1
            path = self.path.with_name(f"{self.path.stem}-{number}{self.path.suffix}")
        return path

    def _write_stream(self, data: bytes) -> None:
        with writing(self.path):
            if self.fifo is not None:
                with self.fifo as end:
                    write_all(end.fileno(), data)
                return
            own = _own_descriptor(self.path)
            if own is not None and sys.stdout is not None:
                with suppress(ValueError):
                    sys.stdout.flush()  # what was printed before comes before
            fd = os.dup(own) if own is not None else os.open(self.path, os.O_WRONLY | getattr(os, "O_NOCTTY", 0))
            try:
                write_all(fd, data)
            finally:
                os.close(fd)


def _open_fifo(path: Path) -> io.FileIO:
    """Our end of a FIFO. Raises: UserError if nobody has the other end open for reading, nor soon does."""
    until = time.monotonic() + READER_SECONDS
    while True:
        try:
            end = io.FileIO(os.open(path, os.O_WRONLY | os.O_NONBLOCK), "w")
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > until:
                raise UserError(
                    f"{path} is a FIFO, and nobody reads it; start its reader first, or name another place"
                ) from None
            time.sleep(0.02)
        else:
            os.set_blocking(end.fileno(), True)
            return end


def _mode(path: Path) -> int | None:
    """Of what a path leads to; None if nothing is there."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


def _link(path: Path) -> str:
    return f" (a link to {os.readlink(path)})" if path.is_symlink() else ""


def _own_descriptor(path: Path) -> int | None:
    """The open descriptor of this process that a path such as /dev/stdout leads to."""
    for _ in range(_MOST_LINKS):
        folder = os.path.realpath(path.parent)
        if path.name.isdecimal() and _DESCRIPTORS.fullmatch(folder):
            own = folder == "/dev/fd" or f"/{os.getpid()}/" in folder
            return int(path.name) if own else None
        try:
            path = path.parent / os.readlink(path)
        except OSError:
            return None
    return None
