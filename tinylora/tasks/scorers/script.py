"""Where words end, by script: "cat" is no word of "concatenate", but 東京 is one of 答えは東京です.

Letters of scripts that put spaces between words hold together with their neighbours, digits and combining marks
included. Han, Hiragana, Thai, Lao, Khmer, Burmese and Tibetan put none, so nothing can be told from a neighbour there,
and any place between two characters counts as an end (a dictionary would be needed: 京都 is found in 東京都).
A run of Katakana is a word, so is one of Han numerals, and Korean words begin behind a space and end in particles.
"""

import unicodedata
from functools import lru_cache

_SPACELESS = ("CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ", "BOPOMOFO ")
_KATAKANA = ("KATAKANA", "HALFWIDTH KATAKANA")
_HAN_NUMERALS = frozenset("〇零一二三四五六七八九十百千万億兆两萬億")


@lru_cache(maxsize=4096)
def _kind(character: str) -> str:
    """letter (digits, too), mark, spaceless, numeral, katakana or hangul; empty for what is no part of a word."""
    if unicodedata.category(character).startswith("M"):
        return "" if "\ufe00" <= character <= "\ufe0f" else "mark"  # a variation selector spells nothing
    if not (character.isalnum() or character == "_"):
        return ""
    if character in _HAN_NUMERALS:
        return "numeral"
    name = unicodedata.name(character, "")
    if character.isdecimal():
        return "letter"
    if name.startswith(_SPACELESS):
        return "spaceless"
    if name.startswith(_KATAKANA):
        return "katakana"
    return "hangul" if name.startswith(("HANGUL ", "HALFWIDTH HANGUL ")) else "letter"


def is_spaceless(character: str) -> bool:
    """Whether a letter is of a script whose words can stand beside others without a space, such as 東 or は."""
    return _kind(character) in ("spaceless", "numeral", "katakana", "hangul")


def joined(left: str, right: str, *, at_end: bool = False) -> bool:
    """Whether two neighbouring characters belong to one word. at_end: at the end of a word that was found."""
    a, b = _kind(left), _kind(right)
    if b == "mark":
        return a != ""
    if a == "mark":
        return b == "letter"
    if a == b == "hangul":
        return not at_end
    return a == b and a in ("letter", "numeral", "katakana")
