"""Folders for other tools: whole or not at all, and never over something that is not ours to replace."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tinylora.errors import UserError


def check_folder(folder: Path) -> None:
    """Raises: UserError if the folder cannot be made, because something with that name and content is there."""
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; choose another one, or delete it")


def write_folder(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files into a new folder, which appears when all of them are there. Raises: UserError if it is in use."""
    check_folder(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"cannot write {folder} ({error.strerror}); choose another place") from error
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / "folder"
        made.mkdir()
        for name, content in files.items():
            (made / name).write_bytes(content.encode() if isinstance(content, str) else content)
        put_in_place(made, folder)


def put_in_place(made: Path, folder: Path) -> None:
    """Move a finished folder to its place, where at most an empty folder is."""
    if folder.exists():
        folder.rmdir()
    shutil.move(str(made), str(folder))
