r"""Answers in LaTeX: what stands in \boxed{...}, an answer without its decoration, a number without its unit."""

import re
from dataclasses import dataclass
from decimal import Decimal

from tinylora.tasks.scorers.numeric import parse_number, plain, split_number, without_period

_BOXES = re.compile(r"\\(?:text|mathrm|textrm|textbf|textit|mathbf|mathit|mathsf|mbox|operatorname)\s*\{([^{}]*)\}")
_DOLLARS = re.compile(r"\A\$+|(?<!\\)\$+\Z")
_FRACTION = re.compile(r"\\frac\s*\{([^{}0-9]*)\}\s*\{([^{}0-9]*)\}")
_SPACING = re.compile(r"\\[,;: ]|\\(?:quad|qquad|thinspace)(?![A-Za-z])|~")
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])|\u00ba")
_CODES = r"(?:USD|EUR|GBP|JPY|CNY|RMB|INR|CAD|AUD|CHF|Rs\.?)"
_MONEY = re.compile(rf"(?:[A-Z]{{1,3}}(?=[$]))?[$€£¥₹₩₽₺₫₴₪฿₦]|(?<![A-Za-z]){_CODES}(?![A-Za-z])")
_POWER = re.compile(r"\^\s*(?:\{\s*-?[0-9]\s*\}|-?[0-9])|[\u00b2\u00b3]")
_UNIT = re.compile(r"(?:[A-Za-zµμΩÅ°%\u00c0-\u024f]+[.]?|[/·*()'’-]|\s)+")
_ATTACHED = re.compile(
    r"[cmkdn]?m|k?g|mg|[mckd]l|lbs?|oz|ft|yd|mi|[mk]ph|kmh|mins?|secs?|hrs?|[mn]s|[km]?wh?|[kmg]?hz|k?pa|mol|ha|[kmgt]b|k?cal"
    r"|kj|deg|rad|usd|eur|gbp|[cf]",
)
"""Units that need no space before them; "18x" is a product."""
_LETTERS = frozenset("mgshlLNJWVAKCFtb")
_NO_UNITS = re.compile(
    "and|or|to|plus|minus|times|over|mod|more|less|fewer|than|not|no|from|of|dozens?|half|halves|thirds?|fourths?|fifths?"
    "|sixths?|eighths?|tenths?|hundreds?|thousands?|[a-z]*illions?|lakh|crore|remainder|sqrt|pi|choose|factorial|i[iv]+"
)
"""Words that change the number before them."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with what says of what it is one."""

    value: Decimal
    unit: str = ""
    """What stands behind it; a currency does not count."""


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete \boxed{...}, nested braces included, escaped ones (\{ \}) not counted; or None."""
    open_braces: list[int] = []  # where the content begins if the brace opens a box, else -1
    found: tuple[int, int] | None = None
    for token in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if token.group() == "}":
            start = open_braces.pop() if open_braces else -1
            if start >= 0 and (found is None or start > found[0]):
                found = (start, token.start())
        elif token.group().endswith("{") and token.group() != r"\{":
            open_braces.append(token.end() if len(token.group()) > 1 else -1)
    return text[found[0] : found[1]] if found else None


def plain_latex(text: str) -> str:
    r"""An answer without what LaTeX adds to its looks: $, \$, \%, spacing, \left, \dfrac, \text{...}, a period, braces
    around it. White space goes, but for that between digits, where it parts two numbers.
    """
    text = _undecorated(text)
    number = parse_number(text)
    if number is not None:
        return re.sub(r"[^0-9.eE+−–-]", "", plain(text))
    text = re.sub("[−–]", "-", plain(text)).replace("$", "").removesuffix("%")
    text = re.sub(r"(\\frac)\s*([0-9])\s*([0-9])", r"\1{\2}{\3}", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"(?<![0-9.]) | (?![0-9.])", "", text)
    braced = re.fullmatch(r"\{([^{}]*)\}", text)
    return braced[1] if braced else text


def quantity(text: str, *, spaced: bool = False) -> Quantity | None:
    r"""The number that an answer is, its currency and unit apart ("€18", "18 dollars", `16 \text{ cm}^3`, "90°").

    None where it is none, or where the words behind it change its value ("2 million", "2 or more", "5x").
    spaced: as for `parse_number`.
    """
    text = _undecorated(text)
    braced = re.fullmatch(r"\{([^{}]*)\}", text)
    text = braced[1].strip() if braced else text
    text = _MONEY.sub("", text).strip()
    whole = parse_number(text, spaced=spaced)
    if whole is not None:
        return Quantity(whole)
    value, rest = split_number(text, spaced=spaced)
    if value is None or not _is_unit(rest):
        return None
    return Quantity(value, " ".join(rest.split()))


def same_answer(given: str, gold: str) -> bool:
    r"""Whether what a box holds is the answer: equal as numbers, units ignored, or as texts without decoration.

    Where both name a unit, and the answer does so in bare words, they must be equal: "2 weeks" is not "2 days".
    """
    if plain_latex(given) == plain_latex(gold):
        return True
    wanted = quantity(gold)
    if wanted is None or not _is_plain_unit(wanted.unit):
        return False
    found = quantity(given, spaced=True)
    if found is None or found.value != wanted.value:
        return False
    either = not (found.unit and wanted.unit) or _BOXES.search(gold) is not None
    return either or found.unit.casefold().rstrip("s.") == wanted.unit.casefold().rstrip("s.")


def gold_value(gold: str) -> Decimal | None:
    """The number that an answer is, or None."""
    wanted = quantity(gold)
    return wanted.value if wanted is not None and _is_plain_unit(wanted.unit) else None


def _undecorated(text: str) -> str:
    text = without_period(text)
    inner = re.fullmatch(r"\\\((.*)\\\)|\\\[(.*)\\\]", text, re.DOTALL)
    text = without_period((inner[1] or inner[2] or "") if inner else _DOLLARS.sub("", text))
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text)
    text = _BOXES.sub(r" \1 ", text)
    text = text.replace(",\\!", ",").replace("{,}", ",").replace("\\!", "").replace("{\\,}", "\\,").replace("{}", "")
    text = _SPACING.sub("\u2009", text).replace("\\$", "$").replace("\\%", "%")
    return without_period(_DEGREES.sub("°", text))


def _is_unit(text: str) -> bool:
    """Whether what stands behind a number says of what it is one, and does not change it."""
    text = _POWER.sub("", _FRACTION.sub(r"\1/\2", text.replace("\\cdot", "·").replace("\u2009", " ")))
    if not text.strip():
        return False
    if _UNIT.fullmatch(text) is None:
        return False
    words = re.findall(r"[^\W\d_]+", text)
    attached = words and text.startswith(words[0])
    if any(_NO_UNITS.fullmatch(word.casefold()) for word in words):
        return False
    if attached and _ATTACHED.fullmatch(words[0].casefold()) is None:
        return False
    if not words:
        return text.strip() in ("%", "°", "'")
    return len(words[0]) > 1 or words[0] in _LETTERS or "°" in text


def _is_plain_unit(unit: str) -> bool:
    """Of an answer: "dollars" or "km/h" is a unit, and the rest of a title ("12 Angry Men") is none."""
    return len(re.findall(r"[^\W\d_]+", unit)) <= 3 and re.search(r"(?<![^\W\d_])[A-Z][a-z]{2}", unit) is None
