"""Numbers in text, compared by exact decimal value: "42", "42.0", "+42" and "1,000" = "1000.00", never by float."""

import re
from decimal import Decimal

# Thousands commas must be in the right places, else "3,14" would be read as 314. A minus is a sign only where it
# does not follow a digit, a letter or a closing bracket: "5-3" ends with 3, "= -3" with -3. ASCII digits only.
_MAGNITUDE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])[-+])?(?:{_MAGNITUDE})(?:[eE][-+]?[0-9]{{1,4}}(?![0-9]))?")


def _plain(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",")  # a minus and 1{,}200 as they are typeset


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def parse_number(text: str) -> Decimal | None:
    """The value of a text that is one number and nothing else but surrounding white space; None otherwise."""
    text = _plain(text.strip())
    return _value(text) if _NUMBER.fullmatch(text) else None


def last_number(text: str) -> Decimal | None:
    """The value of the last number that stands anywhere in the text."""
    found = None
    for found in _NUMBER.finditer(_plain(text)):  # noqa: B007 (only the last match is wanted)
        pass
    return _value(found.group()) if found else None


def final_number(text: str) -> str | None:
    """The number a text ends with (white space and one period may follow), as it is written there.

    None where that number is part of something else: the operand of a sum that was not worked out ("17 + 25"), the
    tail of a fraction ("5/42"), of a time ("3:42"), of "12,34", or of a word ("x42").
    """
    text = _plain(text.rstrip().removesuffix("."))
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007
        pass
    if not found or found.end() != len(text):
        return None
    before = text[: found.start()]
    if re.search(r"[0-9]:$", before):
        return None
    if before.endswith((",", ".", "_")) or before[-1:].isalnum() or before.rstrip(" \t").endswith(tuple("+-*/×÷^")):
        return None
    return found.group()


def same_value(a: str, b: str) -> bool:
    """Equal as numbers where both are numbers, else as text without surrounding white space."""
    x, y = parse_number(a), parse_number(b)
    return a.strip() == b.strip() if x is None or y is None else x == y
