"""Whether an answer stands in a text as whole words and whole numbers.

"1" does not stand in "1.5", "1,000", "1/2" or "3:15", "5" not in "-5" or "-$5", "can" not in "can't". "cat" does not
stand in "concatenate", and 東京 does in 答えは東京です: `script.py` says where words end.
"""

import re
import unicodedata
from decimal import Decimal

from tinylora.tasks.scorers.numeric import Number, numbers
from tinylora.tasks.scorers.script import joined

_CONTRACTED = re.compile(r"['’](?:t|re|ve|ll|d|m)(?![^\W_])", re.IGNORECASE)
_PARTS = ("", ":", "/", "^")
"""What joins two numbers to something else: a version, a time, a fraction, a power."""
_ENDING = re.compile(r"(?:t|re|ve|ll|d|m|s)\Z", re.IGNORECASE)


def has_phrase(text: str, phrase: str) -> bool:
    """Whether `phrase` stands in `text`, cut off at its ends from what else there is; both in Unicode NFC."""
    if not phrase:
        return False
    inner: frozenset[int] | None = None
    at = text.find(phrase)
    while at >= 0:
        end = at + len(phrase)
        if _is_whole(text, at, end):
            inner = _inside_numbers(text) if inner is None else inner
            if at not in inner and end not in inner:
                return True
        at = text.find(phrase, at + 1)
    return False


def has_number(text: str, value: Decimal) -> bool:
    """Whether a number of this value stands in `text`, however it is written, and is part of nothing else."""
    inner: frozenset[int] | None = None
    for start, end in (_span(one) for one in numbers(text) if one.value == value):
        if _is_whole(text, start, end):
            inner = _inside_numbers(text) if inner is None else inner
            if start not in inner and end not in inner:
                return True
    return False


def plain_words(text: str) -> str:
    """Case and spacing taken off."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _is_whole(text: str, start: int, end: int) -> bool:
    """Whether text[start:end] begins and ends where words do."""
    if start and joined(text[start - 1], text[start]):
        return False
    if end < len(text) and joined(text[end - 1], text[end], at_end=True):
        return False
    if text[end - 1].isalpha() and _CONTRACTED.match(text, end):  # the "can" of "can't"
        return False
    behind_apostrophe = start > 1 and text[start - 1] in "'’" and text[start - 2].isalpha()
    return not (behind_apostrophe and _ENDING.fullmatch(text, start, end))


def _inside_numbers(text: str) -> frozenset[int]:
    """Places that lie within a number, a fraction, a time or a version: what begins or ends there is a part of it."""
    spans = [_span(one) for one in numbers(text)]
    inside: set[int] = set()
    for index, (start, end) in enumerate(spans):
        inside.update(range(start + 1, end))
        if index + 1 == len(spans):
            break
        gap = text[end : spans[index + 1][0]]
        if gap in _PARTS and not (gap == "/" and _is_date(text, end)):
            inside.update((end, spans[index + 1][0]))
    return frozenset(inside)


def _span(number: Number) -> tuple[int, int]:
    """Where a number stands: from its sign, or its first digit if it has none, whatever currency is before it."""
    return (number.start if number.sign else number.end - len(number.digits)), number.end


def _is_date(text: str, slash: int) -> bool:
    """Whether the slash is one of two or more, as in 05/01/2023, and so no fraction bar."""
    return bool(
        re.search(r"/[0-9]+\Z", text[max(0, slash - 6) : slash]) or re.match(r"/[0-9]+/", text[slash : slash + 8])
    )
