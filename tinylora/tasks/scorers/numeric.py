r"""Numbers in text, compared by exact decimal value: "42", "42.0", "+42" and "1,000" = "1000.00", never by float.

A number is digits with a decimal point, thousands in groups of three, and the sign that stands before it, be it a
hyphen, a minus or an en dash, before a currency sign or not ("-5", "–$5", "- 5", "$-5"). Groups of three are joined by
a comma, by what LaTeX and typesetters put there (`\,`, `,\!`, `{,}`, a thin or no-break space), by an apostrophe, or,
in replies, by a space. ASCII and full-width digits only. `operand.py` tells a number that is an answer from one that
is part of a sum, a list or a date.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

from tinylora.tasks.scorers.script import is_spaceless

# Places stay as they are: every character becomes one. An em dash is never a sign, an en dash can be.
_SAME = str.maketrans(
    {
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
        **dict.fromkeys("\uff0b\ufe62", "+"),
        **dict.fromkeys("\uff0d\ufe63\u2010\u2011", "-"),
        "\u2012": "\u2013",
        **dict.fromkeys("\u2015\u2e3a\ufe58", "\u2014"),
        "\uff0e": ".",
        **dict.fromkeys("\uff1d", "="),
        "\uff05": "%",
    }
)
_SIGNS = "+-\u2212\u2013"
_SPACES = " \t\u00a0\u2009\u202f"
_GROUP_MARKS = r",\\!|\{,\}|\{\\,\}|\\[,;: ]|\\thinspace ?|[,~'\u2019\u00a0\u2005-\u200a\u202f]"
# Thousands must be in the right places, else "3,14" would be read as 314, and none begins with 0.
_BY_MARKS = rf"[1-9][0-9]{{0,2}}(?P<mark>{_GROUP_MARKS})[0-9]{{3}}(?:(?P=mark)[0-9]{{3}})*(?![0-9])"
_BY_SPACES = r"(?<![0-9] )[1-9][0-9]{0,2}(?: [0-9]{3})+(?! ?[0-9])"
_REST = r"[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4}(?![0-9]))?"
_EXACT = re.compile(rf"(?:(?:{_BY_MARKS}|{_REST}")
_LOOSE = re.compile(rf"(?:(?:{_BY_MARKS}|{_BY_SPACES}|{_REST}")
_WHOLE_SIGN = re.compile(rf"([{re.escape(_SIGNS)}]?)[{_SPACES}]?")
_WORD_SIGN = re.compile(r"(?<![^\W_])(negative|minus)[ \t]+\Z", re.IGNORECASE)
_LABEL = re.compile(r"(?:\A|\n)[ \t]*(?:[0-9]{1,2}|\(?[A-Za-z])\)\Z")
_COPULAS = re.compile(
    "is|was|are|were|be|been|equals?|to|of|by|at|than|about|approximately|roughly|exactly|gets?|gives?|makes?|becomes?"
    "|yields|has|have|ist|sind|est|sont|es|son|beträgt"
)
"""Words behind which "- 5" is a number; behind others the dash can be a pause."""
_LAST_WORD = re.compile(r"(?<![^\W\d_])([0-9][ \t]*)?(?<![^\W\d_'’])([^\W\d_]+)\Z")
_VARIABLES = frozenset("bcdefghijklmnopqrstuvwxyzBCDEFGHJKLMNOPQRSTUVWXYZ")
"""Words of one letter that are none ("a", "A", "I")."""
_LOOK_BACK = 40


@dataclass(frozen=True, slots=True)
class Number:
    """A number in a text."""

    digits: str
    """As they stand there, without sign."""
    sign: str
    """"-", "+" or nothing."""
    start: int
    """Where it begins, its sign and currency sign included."""
    end: int
    dash: str = ""
    """A dash right before it that is no sign, or cannot be told from a hyphen or a pause."""

    @property
    def value(self) -> Decimal:
        """Exact."""
        return Decimal(self.sign + re.sub(r"[^0-9.eE+-]", "", self.digits))

    @property
    def written(self) -> str:
        """Sign and digits, thousands joined by commas or by nothing."""
        plain = re.fullmatch(r"[0-9.,eE+-]*", self.digits)
        return self.sign + (self.digits if plain else re.sub(r"[^0-9.eE+-]", "", self.digits))


def plain(text: str) -> str:
    """Full-width digits and signs as ASCII, all kinds of dashes as three; every character stays in its place."""
    return text.translate(_SAME)


def numbers(text: str) -> Iterator[Number]:
    """The numbers of a reply, in order."""
    text = plain(text)
    one_line = "\n" not in text.strip()
    for found in _LOOSE.finditer(text):
        start, sign, dash = _before(text, found.start(), one_line)
        yield Number(found.group(), sign, start, found.end(), dash)


def parse_number(text: str, *, spaced: bool = False) -> Decimal | None:
    """The value of a text that is one number and nothing else but surrounding white space; None otherwise.

    spaced: groups of three may be joined by spaces, as in a reply; in an answer "12 345" can be two numbers.
    """
    value, rest = split_number(text.strip(), spaced=spaced)
    return value if not rest else None


def split_number(text: str, *, spaced: bool = False) -> tuple[Decimal | None, str]:
    """The number that a text begins with, or None, and what stands behind it. `spaced` as for `parse_number`."""
    sign = _WHOLE_SIGN.match(plain(text))
    assert sign is not None  # it matches nothing, too
    digits = (_LOOSE if spaced else _EXACT).match(plain(text), sign.end() if sign[1] else 0)
    if digits is None:
        return None, text
    return Number(digits.group(), _ascii_sign(sign[1]), 0, digits.end()).value, text[digits.end() :]


def last_number(text: str) -> Decimal | None:
    """The value of the last number that stands anywhere in the text."""
    found = None
    for found in numbers(text):  # noqa: B007 (only the last one is wanted)
        pass
    return found.value if found else None


def without_period(text: str) -> str:
    """The text without one period at its end, and without the white space around it."""
    text = text.strip()
    return text[:-1].rstrip() if text.endswith((".", "。", "\uff0e")) and not text.endswith("..") else text


def _ascii_sign(sign: str) -> str:
    return "-" if sign and sign != "+" else sign


def _back(text: str, at: int) -> int:
    while at > 0 and text[at - 1] in _SPACES:
        at -= 1
    return at


def _currency(text: str, at: int) -> int:
    """Where the currency sign that ends at `at` begins ("$", "\\$", "US$"), or `at` where there is none."""
    if at == 0 or unicodedata.category(text[at - 1]) != "Sc":
        return at
    at -= 1
    if at and text[at - 1] == "\\":
        return at - 1
    letters = at
    while letters and at - letters < 3 and "A" <= text[letters - 1] <= "Z":
        letters -= 1
    return letters if not (letters and text[letters - 1].isalnum()) else at


def _before(text: str, digits: int, one_line: bool) -> tuple[int, str, str]:
    """(where the number begins, its sign, a dash before it that is none) for digits that begin at `digits`."""
    gap = _back(text, digits)
    start = money = _currency(text, gap)
    if money == gap:
        start = digits
    place = (gap if start == digits else _back(text, money)) - 1
    if place < 0 or text[place] not in _SIGNS:
        return _by_word(text, start)
    if not _is_sign(text, place, is_spaced=place < start - 1, one_line=one_line):
        return start, "", text[place]
    gap = _back(text, place)
    money = _currency(text, gap)  # "$-5"
    return place if money == gap else money, _ascii_sign(text[place]), ""


def _by_word(text: str, start: int) -> tuple[int, str, str]:
    """The sign of "negative 5" and "minus 5", the latter not behind a number."""
    word = _WORD_SIGN.search(text[max(0, start - _LOOK_BACK) : start])
    if word is None:
        return start, "", ""
    begin = start - len(word.group())
    if word[1].lower() == "minus" and _is_operand(text, _back(text, begin)):
        return start, "", ""
    return begin, "-", ""


def _is_operand(text: str, end: int, *, units: bool = True) -> bool:
    """Whether what ends there can stand left of a minus: a number, a bracket, a variable, an amount with its unit."""
    last, near = text[end - 1 : end], text[max(0, end - _LOOK_BACK) : end]
    if not last or last.isdigit() or last in "%°!":
        return last != ""
    if last in ")]}":
        return _LABEL.search(near) is None
    if unicodedata.category(last) == "Sc":  # 5$, or the end of $x$
        return text[end - 2 : end - 1].isalnum() or text[end - 2 : end - 1] in (")", "]", "}")
    word = _LAST_WORD.search(near)
    if word is None:
        return False
    if word[2] in _VARIABLES:
        return True
    return units and bool(word[1]) and _COPULAS.fullmatch(word[2].casefold()) is None


def _is_sign(text: str, place: int, *, is_spaced: bool, one_line: bool) -> bool:
    """Whether the sign at `place`, which a number follows, is that number's, and no operator, hyphen or bullet."""
    before = text[place - 1] if place else "\n"
    if before not in _SPACES + "\n":  # attached: "5-3", "x-3", "(5)-3", "COVID-19", but 答えは-5
        if before.isalnum() or before == "_":
            letter = is_spaceless(before) and not text[max(0, place - 2) : place - 1].isdigit()
            return letter and not is_spaced
        if _is_operand(text, place):
            return False
        return not (is_spaced and before in ".!?")
    end = _back(text, place)
    if end == 0 or text[end - 1] == "\n":  # "- 5" in a line of its own is a bullet where there are other lines
        return one_line or not is_spaced
    if _is_operand(text, end, units=is_spaced):
        return False
    last = text[end - 1]
    if not is_spaced or text[place] == "\u2212":
        return True
    if last.isalpha() and not is_spaceless(last):  # "is - 5", but "The answer - 5"
        word = _LAST_WORD.search(text[max(0, end - _LOOK_BACK) : end])
        return word is not None and _COPULAS.fullmatch(word[2].casefold()) is not None
    return last not in ".!?"
