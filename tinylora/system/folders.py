"""Folders for other tools: whole or not at all, and never over something that is not ours to replace."""

import os
import re
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tinylora.errors import UserError
from tinylora.system.failures import writing
from tinylora.system.files import MOST_NAME

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
    """That a new folder can be made there; those above it are made. Found out before long work.

    Raises: UserError if something with that name and content is there, or the place cannot be written to.
    """
    with writing(folder):
        if folder.is_symlink() or (os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()))):
            raise UserError(f"{folder} exists and is not an empty folder; choose another one, or delete it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:MOST_NAME]}-"):
            pass  # asks the file system itself, which may be read-only


@contextmanager
def folder_beside(folder: Path) -> Iterator[Path]:
    """A folder of another name beside `folder`, which takes its place when the block ends well. Raises: UserError."""
    check_folder(folder)
    with (
        writing(folder),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:MOST_NAME]}-") as scratch,
    ):
        yield (made := Path(scratch) / "folder")
        if folder.exists():
            folder.rmdir()
        os.rename(made, folder)


def write_folder(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files into a new folder, which appears when all of them are there. Raises: UserError if it is in use."""
    with folder_beside(folder) as made:
        made.mkdir()
        for name, content in files.items():
            (made / name).write_bytes(content.encode() if isinstance(content, str) else content)
