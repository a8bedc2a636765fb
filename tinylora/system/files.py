"""Writing files so that a kill, a full disk or a power cut leaves the old bytes or the new ones.

What is written gets a fresh name beside its target first: one that nobody can have planted there, and no link is
followed on the way. A target that is a link is replaced itself; what it names stays. Modes are as the umask says.
"""

import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tinylora.errors import UserError
from tinylora.system.failures import writing

_BINARY = getattr(os, "O_BINARY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
MOST_NAME = 40
"""Characters of a target's name that its scratch file takes up, so that a long one does not make a name too long."""


def write_all(fd: int, data: bytes) -> None:
    """Write every byte: one `os.write` may take only a part of them (near a full disk, for one)."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_atomically(path: Path, data: bytes, *, then: str = "choose another place", again: str = "try again") -> None:
    """After a kill or a power cut at any instant `path` holds the old bytes or the new ones, never a part of either.

    Raises: UserError, one sentence, for whatever the system refuses, and for a device, a FIFO or a socket, which is not
    replaced by a file.
    """
    with writing(path, then, again):
        refuse_other_than_file(path)
        fd, scratch = _fresh(path)
        try:
            try:
                write_all(fd, data)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)  # gives a full disk its room back
            raise
        flush(path.parent)  # the rename itself


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A fresh empty file beside the target, which takes its place in one step when the block ends well. Not flushed."""
    refuse_other_than_file(target)
    fd, scratch = _fresh(target)
    os.close(fd)
    try:
        yield scratch
        os.replace(scratch, target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def replace_file(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside the target, then put it in its place in one step: for caches, where several
    processes may write the same file at once and the last one wins, whole. Nothing is flushed to the disk.

    Raises: OSError, as a cache that cannot be written may be no harm.
    """
    with scratch_beside(target) as scratch:
        write(scratch)


def refuse_other_than_file(path: Path) -> None:
    """Raises: UserError if something is there that is neither a regular file nor a link."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):  # of a folder the system itself tells
        raise UserError(f"{path} is {kind_of(mode)}, which no file takes the place of; choose another name")


def kind_of(mode: int) -> str:
    """What a path is that is no file, in words."""
    kinds = {
        stat.S_IFCHR: "a device", stat.S_IFBLK: "a block device", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
        stat.S_IFDIR: "a folder",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "no file")


def open_to_append(path: Path) -> int:
    """A descriptor that appends to a regular file, made if it is not there; no link is followed.

    Raises: OSError; UserError for a device, a FIFO or a socket.
    """
    refuse_other_than_file(path)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_LINK | _BINARY, 0o666)


def cut(path: Path, length: int) -> None:
    """Cut a file to so many bytes and flush it; no link is followed. Raises: OSError; UserError for what is none."""
    refuse_other_than_file(path)
    fd = os.open(path, os.O_WRONLY | _NO_LINK | _BINARY)
    try:
        os.ftruncate(fd, length)
        os.fsync(fd)
    finally:
        os.close(fd)


def _fresh(target: Path) -> tuple[int, Path]:
    """A file beside the target that was not there before, open for writing, with its name.

    As tempfile.mkstemp makes it (a random name, never an existing one, never through a link), but with the mode that
    the umask gives.
    """
    while True:
        scratch = target.with_name(f".{target.name[:MOST_NAME]}.{secrets.token_hex(6)}.tmp")
        try:
            return os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK | _BINARY, 0o666), scratch
        except FileExistsError:  # once in 2^48
            continue


def flush(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk. A missing file is fine; Windows cannot flush a folder."""
    if not path.exists() or (os.name == "nt" and path.is_dir()):
        return
    fd = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
