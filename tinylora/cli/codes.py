"""Codes that were cut in pieces, as for reading aloud: `tinylora decode TINY -7WX 4R0G 8...` means one code."""

import re
from collections.abc import Sequence
from pathlib import Path

_BEGINNING = re.compile(r"TINY(?:-[0-9A-HJKMNP-TV-Z]*)?", re.IGNORECASE)
_PIECE = re.compile(r"-?[0-9A-HJKMNP-TV-Z]{1,8}", re.IGNORECASE)


def with_whole_codes(words: Sequence[str]) -> list[str]:
    """The words of a command, with the pieces of a code as one; what follows a whole code stays as it is."""
    found: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if _BEGINNING.fullmatch(word) and not Path(word).exists():
            while rest and _PIECE.fullmatch(rest[0]) and not (_is_whole(word) or Path(rest[0]).exists()):
                word += rest.pop(0)
        found.append(word)
    return found


def _is_whole(code: str) -> bool:
    from tinylora.adapter.code import from_code
    from tinylora.errors import UserError

    try:
        from_code(code)
    except UserError:
        return False
    return True
