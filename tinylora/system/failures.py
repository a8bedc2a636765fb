"""What the operating system refuses, said in one sentence, by one mechanism for everything that writes."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinylora.errors import UserError

# EDQUOT: over quota; EFBIG: over the process's file size limit (ulimit -f). All three end a write for want of room.
NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
OF_THE_MACHINE = NO_ROOM | {
    getattr(errno, name)
    for name in (
        "EACCES", "EBUSY", "EEXIST", "EIO", "EISDIR", "ELOOP", "EMFILE", "EMLINK", "ENAMETOOLONG", "ENFILE", "ENODEV",
        "ENOENT", "ENOLCK", "ENOTDIR", "ENOTEMPTY", "ENOTSUP", "ENXIO", "EPERM", "EREMOTEIO", "EROFS", "ESTALE",
        "ETXTBSY", "EXDEV",
    )
    if hasattr(errno, name)
}  # fmt: skip
"""What says something of files and disks, and nothing of a mistake in the program."""


def reason(error: OSError) -> str:
    """The system's own words."""
    return error.strerror or str(error) or type(error).__name__


def cannot_write(error: OSError, path: Path, then: str = "choose another place", again: str = "try again") -> UserError:
    """The sentence about a write that failed. then: what to do next; again: what to do once there is room."""
    if error.errno in NO_ROOM and not _is_device(path):
        folder = path if path.is_dir() else path.parent
        return UserError(
            f"no room to write in {folder} ({reason(error)}); what was saved before is intact: free some space, then "
            f"{again}"
        )
    if error.errno == errno.ELOOP and path.is_symlink():
        return UserError(f"{path} is a link, and what is written here follows none; remove it, or {then}")
    return UserError(f"cannot write {path} ({reason(error)}); {then}")


@contextmanager
def writing(path: Path, then: str = "choose another place", again: str = "try again") -> Iterator[None]:
    """Whatever the operating system refuses in this block becomes `cannot_write`'s sentence. Raises: UserError."""
    try:
        yield
    except OSError as error:
        raise cannot_write(error, path, then, again) from error


def _is_device(path: Path) -> bool:
    try:
        return path.is_char_device() or path.is_fifo()
    except OSError:
        return False
