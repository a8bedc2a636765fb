"""Folders for other tools: whole or not at all, and never over something that is not ours to replace."""

import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from tinylora.errors import UserError

LONGEST_NAME = 100
"""Characters of a name that is given to a folder; file systems take 255 bytes, and numbers and endings follow."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def folder_name(text: str, otherwise: str = "run") -> str:
    """A folder's name made of any text: letters without their accents, digits, and a dash for what lies between.

    >>> [folder_name(text) for text in ("gsm8k-0.5b", "my task", "Übung (2)", "日本")]
    ['gsm8k-0.5b', 'my-task', 'Ubung-2', 'run']
    """
    if _NAME.fullmatch(text) and len(text) <= LONGEST_NAME:
        return text
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return re.sub(r"[^A-Za-z0-9._]+", "-", plain)[:LONGEST_NAME].strip("-._") or otherwise


def check_name(name: str, what: str) -> None:
    """Raises: UserError for a name that no folder gets here."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{what} must be letters, digits, '.', '_' or '-', got {name[:LONGEST_NAME]!r}")
    if len(name) > LONGEST_NAME:
        raise UserError(
            f"{what} must have at most {LONGEST_NAME} characters, as it is a folder's, got {len(name)}: {name[:40]}..."
        )


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
