"""TOML that people write, read with sentences for their usual slips: an encoding, a path in the way of Windows."""

import re
import tomllib
from pathlib import Path
from typing import Any

from tinylora.errors import BACKSLASH, UserError
from tinylora.system.reading import read_text

_PLACE = re.compile(r"at line (\d+)")


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The tables of a file. `what` it is: "recipe", "sweep".

    Raises: UserError for a file that is no regular one, no text in UTF-8, or no TOML.
    """
    return parse_toml(read_text(path, f"give the path of a {what}, a .toml file"), f"{what} {path}")


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """The tables of a text; `source` names it in errors. Raises: UserError for what is no TOML."""
    try:
        return tomllib.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, or a number too long to read
        raise UserError(f"{source} is not TOML: {error}{_hint(text, str(error))}") from error


def _hint(text: str, error: str) -> str:
    place = _PLACE.search(error)
    lines = text.splitlines()
    if place is None or int(place[1]) > len(lines) or "\\" not in lines[int(place[1]) - 1]:
        return ""
    return f"; a backslash begins an escape there: {BACKSLASH}"
