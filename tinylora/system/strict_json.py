"""JSON as its standard has it: what Python reads besides (NaN, a key twice, of which the last wins) is refused."""

import json
from pathlib import Path
from typing import Any

from tinylora.errors import UserError
from tinylora.system.reading import MOST_SETTINGS_BYTES, read_text


def parse_json(text: str | bytes, **options: Any) -> Any:
    """The value. `options` are those of `json.loads`, such as parse_float.

    Raises: ValueError, which says what is wrong, for whatever is no JSON, for NaN and Infinity, for a key that stands
    twice in one object at any depth, and for brackets too deep to read.
    """
    try:
        return json.loads(text, parse_constant=no_constant, object_pairs_hook=distinct_keys, **options)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason})") from error
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None


def no_constant(name: str) -> Any:
    """For `parse_constant`: Python reads NaN and Infinity, which are not JSON."""
    raise ValueError(f"{name} is not JSON")


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook`. Raises: ValueError for a key that stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice in one object; keep one of the two")
    return found


DECODER = json.JSONDecoder(parse_constant=no_constant, object_pairs_hook=distinct_keys)
"""For values that stand one behind the other in a text."""


def read_json(path: Path, then: str, most_bytes: int = MOST_SETTINGS_BYTES) -> Any:
    """The value in a file; `then` is what to do if there is none.

    Raises: UserError for a file that cannot be read as text, or is not JSON.
    """
    text = read_text(path, then, most_bytes)
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} cannot be read: it is not JSON ({error}); {then}") from error
