"""Gold answers for math-verify: read when a task is loaded, and refused where the library reads something else in them.

The library reads whatever it can: "1 000" as 1 times 0, "2023-05-01" as 2017, "listen" as a product of letters that
"silent" equals. What no reply can match, or what a wrong one can, is a mistake in the data, and better told before a
run than found out in it.
"""

import re
import threading
from fractions import Fraction
from functools import lru_cache
from typing import Any

from tinylora.errors import UserError
from tinylora.tasks.base import shorten
from tinylora.tasks.scorers.numeric import parse_number

_SIMPLE = re.compile(r"-?[0-9]+(?:\.[0-9]+)?|-?\\frac\{[0-9]+\}\{[1-9][0-9]*\}")
"""Answers about which there is no doubt."""
_COMMANDS = re.compile(
    r"\\(?:text|mathrm|textrm|textbf|textit|mathbf|mathit|mathsf|mbox|operatorname|begin|end)\*?\s*\{[^{}]*\}|\\[A-Za-z]+"
)
_WORD = re.compile(r"[A-Za-z]{3,}|(?<![A-Za-z])(?:no|on|ok|or|if|is|am|pm|pi)(?![A-Za-z])", re.IGNORECASE)
_DATE = re.compile(
    r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}|[12][0-9]{3}-0[1-9]|[0-9]{1,2}[-./][0-9]{1,2}[-./](?:[0-9]{4}|[0-9]{2})"
)
_CLOCK = re.compile(r"(?:[01]?[0-9]|2[0-4])(?::[0-5][0-9]){1,2}(?:\s*[AaPp]\.?[Mm]\.?)?")
_VERSION = re.compile(r"v?[0-9]+(?:\.[0-9]+){2,}")
_APART = re.compile(r"(?<![_^0-9.])[0-9.]+\s+[0-9]")
_CALLED = frozenset(
    [
        "pi",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "exp",
        "sqrt",
        "gcd",
        "max",
        "min",
        "theta",
        "alpha",
        "beta",
    ]
)
_RANGE = re.compile(r"[0-9]\s*[–—]\s*[0-9]")


def is_marked(answer: str) -> bool:
    """Whether the mathematics in an answer is marked as such; an escaped dollar is money, not a delimiter."""
    return re.search(r"(?<!\\)\$[^$]*\$|\\boxed|\\\(|\\\[", answer) is not None


@lru_cache(maxsize=4096)
def read_gold(answer: str, timeout_seconds: int) -> tuple[Any, ...]:
    """The answer as the library's expressions. Bare LaTeX is put between dollars, which it needs to see it.

    Raises: UserError where there are none, or the library fails.
    """
    from math_verify import parse
    from math_verify.errors import TimeoutException

    text = answer if is_marked(answer) else f"${answer}$"
    in_main = threading.current_thread() is threading.main_thread()  # else its alarm cannot be set
    try:
        gold = tuple(parse(text, parsing_timeout=timeout_seconds if in_main else None, raise_on_error=True))
    except (Exception, TimeoutException) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"scorer math-verify cannot read the answer {shorten(answer)} ({reason[0][:200]})") from error
    if not gold:
        raise UserError(f"scorer math-verify finds no mathematics in the answer {shorten(answer)}; use exact for text")
    return gold


def is_simple(answer: str) -> bool:
    """Whether an answer is a plain number or fraction, which needs no look at how the library reads it."""
    return _SIMPLE.fullmatch(answer) is not None


def misread(answer: str, gold: tuple[Any, ...]) -> str:
    """What the answer is that the library does not see, in words; empty where it reads what stands there."""
    bare = re.sub(r"^\s*\$+|\$+\s*$|^\\\(|\\\)$", "", answer.strip()).strip()
    if _DATE.fullmatch(bare):
        return "a date"
    if _CLOCK.fullmatch(bare):
        return "a time of day (write a ratio as a fraction)"
    if _VERSION.fullmatch(bare):
        return "a version"
    if _RANGE.search(bare):
        return "a range (write an interval as [3, 5])"
    if all(isinstance(one, str) for one in gold) and "\\" not in answer:
        return "text"
    words = _words(bare, gold)
    if words:
        return f"the word {words!r}" + (f" (in LaTeX \\{words})" if words in _CALLED else "")
    value = parse_number(re.sub(r"^\\?\$", "", bare), spaced=True)
    if value is not None:
        return "" if _is_value(gold, Fraction(value)) else f"the number {value}"
    if _APART.search(_COMMANDS.sub("#", re.sub(r"\\[dt]?frac\s*[0-9]\s+[0-9]", "#", bare))):
        return "numbers with nothing but a space between them (write a mixed number as an improper fraction)"
    return ""


def _is_value(gold: tuple[Any, ...], value: Fraction) -> bool:
    import sympy

    wanted = sympy.Rational(value.numerator, value.denominator)
    try:
        return any(
            not isinstance(one, str) and abs(sympy.N(one - wanted, 30)) < 1e-12 * (1 + abs(wanted)) for one in gold
        )
    except Exception:  # sets and the like have no difference
        return False


def _words(bare: str, gold: tuple[Any, ...]) -> str:
    """A word outside of LaTeX's commands that was taken for a product of its letters, or nothing."""
    import sympy
    from sympy.core.function import AppliedUndef

    letters: set[str] = set()
    for one in gold:
        if isinstance(one, sympy.Basic):
            letters.update(*(str(symbol).lower() for symbol in one.free_symbols))
            letters.update(*(str(call.func).lower() for call in one.atoms(AppliedUndef)))
            letters.update("e" if one.has(sympy.E) else "", "i" if one.has(sympy.I) else "")
    for found in _WORD.finditer(_COMMANDS.sub("#", bare)):
        word = found.group().lower()
        if set(word) <= letters and not (len(word) > 2 and _is_product(word)):
            return found.group()
    return ""


def _is_product(letters: str) -> bool:
    """Whether letters side by side are more likely a product than a word: "lwh", "abc", "abcd"."""
    if not set(letters) & set("aeiou"):
        return True
    in_order = list(letters) == sorted(set(letters))
    return in_order and (len(letters) == 3 or ord(letters[-1]) - ord(letters[0]) == len(letters) - 1)
