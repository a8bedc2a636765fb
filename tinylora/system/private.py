"""Folders and files that nobody else may write: for what is run as the user who finds it there."""

import os
import stat
from pathlib import Path


class NotPrivate(Exception):
    """Other users may put something there; the message says where, and what to do."""


def make_private(folder: Path) -> None:
    """Make a folder for this user alone (0700), or see that it is one; one's own is closed to others.

    Raises: NotPrivate for a folder of another user, or one below a folder in which others may put another in its place;
    OSError where it cannot be made.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not hasattr(os, "geteuid"):  # Windows: the folders of a user are closed to others by default
        return
    at = folder.resolve()
    found = at.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise NotPrivate(
            f"{at} belongs to another user (number {found.st_uid}), whose code would run as you; choose a folder of "
            "your own with TINYLORA_CACHE"
        )
    parent = at.parent.stat()
    if parent.st_mode & stat.S_IWOTH and not parent.st_mode & stat.S_ISVTX:
        raise NotPrivate(
            f"everyone may write in {at.parent}, and so put code of theirs where yours is looked for; choose a folder "
            f"of your own with TINYLORA_CACHE, or run: chmod o-w {at.parent}"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and found.st_uid == os.geteuid():
        at.chmod(0o700)
    elif found.st_mode & stat.S_IWOTH:
        raise NotPrivate(f"everyone may write in {at}; choose a folder of your own with TINYLORA_CACHE")


def is_private(file: Path) -> bool:
    """Whether this is a plain file of this user or of root that nobody else may write."""
    found = file.lstat()
    if not stat.S_ISREG(found.st_mode):
        return False
    if not hasattr(os, "geteuid"):
        return True
    return found.st_uid in (os.geteuid(), 0) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
