"""Writing files so that a kill, a full disk or a power cut leaves the old bytes or the new ones."""

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tinylora.errors import UserError

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


@contextmanager
def disk_in_words(path: Path) -> Iterator[None]:
    """One sentence for a full disk, and for a place where this user may not write."""
    with no_room_is_a_user_error(path):
        try:
            yield
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise UserError(f"cannot write in {path} ({error.strerror}); choose another folder") from error


def write_atomically(path: Path, data: bytes) -> None:
    """After a kill or a power cut at any instant `path` holds the old bytes or the new ones, never a part of either."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # gives a full disk its room back
        raise
    flush(path.parent)  # the rename itself


def replace_file(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside the target, then put it in its place in one step: for caches, where several
    processes may write the same file at once and the last one wins, whole. Nothing is flushed to the disk."""
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    os.close(descriptor)
    scratch = Path(name)
    try:
        write(scratch)
        os.replace(scratch, target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk. A missing file is fine; Windows cannot flush a folder."""
    if not path.exists() or (os.name == "nt" and path.is_dir()):
        return
    fd = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
