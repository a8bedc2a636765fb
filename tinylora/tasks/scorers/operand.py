r"""Whether the number at a text's end is its answer or part of something else: an operand, a list, a time, a word.

"17 + 25 = 42." ends with an answer. "17 + 25", `5 \times 10`, "5 -3", "5 times 10", "1, 2, 3", "3–5", "3 out of 5",
"2 1/2", "3:30" and "x42" do not.
"""

import re

from tinylora.tasks.scorers.numeric import Number, numbers, plain, without_period
from tinylora.tasks.scorers.script import joined

_OPERATOR = re.compile(
    r"(?:[-+*/×÷^·∙⋅∗⁄∕±∓√≠<≤≥]|[\w)\]}][ \t]+>|!=|[_^]\{"
    r"|\\(?:times|cdot|div|ast|star|pm|mp|bmod|mod|pmod|over|le|leq|ge|geq|ne|neq|lt|gt|bullet|circ|log|ln|sqrt)"
    r"|\\sqrt\s*(?:\[[^\[\]{}]*\])|\\[dtc]?frac\s*(?:\{[^{}]*\}|[0-9])"
    r"|(?<![^\W_])(?:sqrt|log|ln|sin|cos|tan|exp|mod))[ \t]*\Z"
)
_VALUE = r"(?:[0-9]|[0-9][ \t]*[%°)\]}$€£¥]+|[)\]}])"
_BETWEEN = re.compile(
    rf"{_VALUE}(?:"
    r"[ \t]*[xX][ \t]*"
    r"|[ \t]+%[ \t]*"
    r"|[ \t]+:[ \t]*"
    r"|[ \t]*[,;、，；&][ \t]*(?:(?:and|or|und|oder|et|ou|y|o)[ \t]+)?"
    r"|[ \t]*,?[ \t]+(?:and|or|plus|minus|times|over|mod|modulo|through|by|und|oder|et|ou|bis|mal|durch"
    r"|divided[ ]by|multiplied[ ]by|added[ ]to|to[ ]the[ ]power[ ]of|(?:out[ ])?of)[ \t]+"
    r"|[ \t]*[和与與及或、到至と][ \t]*"
    r"|[ \t]*,?[ \t]*or[ \t]+[^\W\d]\w*[ \t]*=[ \t]*"
    r"|(?<=[0-9])[ \t]+)\Z",
    re.IGNORECASE,
)
_RANGE = re.compile(rf"{_VALUE}[ \t]*(?:[-–—−~～〜]|(?<!\w)to)[ \t]*\Z", re.IGNORECASE)
_FROM = re.compile(r"\bfrom\b[^.\n]*\Z", re.IGNORECASE)
_LEFT_OF_DASH = re.compile(r"(?:(?<!\w)[^\W\d_]|[0-9][ \t]*[^\W\d_]+)[ \t]*–[ \t]*\Z")
"""A variable, or an amount with its unit, before an en dash."""
_LOOK_BACK = 80


def final_number(text: str) -> str | None:
    """The number a text ends with (white space and one period may follow), as it is written there but for what stands
    between its sign and its digits. None where that number is part of something else.
    """
    text = without_period(text)
    found = None
    for found in numbers(text):  # noqa: B007 (only the last one is wanted)
        pass
    return found.written if found and found.end == len(text) and not _is_part(plain(text), found) else None


def _is_part(text: str, number: Number) -> bool:
    before = text[max(0, number.start - _LOOK_BACK) : number.start]
    if not before:
        return False
    if (
        before[-1].isdigit()
        or before.endswith((",", ".", "_", "\\"))
        or joined(before[-1], text[number.start], at_end=True)
    ):
        return True
    if re.search(r"[0-9][:,，、][ \t]*\Z", before) and not re.search(r"[0-9]:[ \t]+\Z", before):
        return True
    if number.dash and number.dash in "-−":
        return True
    if _OPERATOR.search(before) or _BETWEEN.search(before):
        return True
    ranged = _RANGE.search(before)
    if ranged is None:
        return number.dash != "" and _LEFT_OF_DASH.search(before) is not None
    return not (ranged.group().rstrip().lower().endswith("to") and _FROM.search(before[: ranged.start()]))
