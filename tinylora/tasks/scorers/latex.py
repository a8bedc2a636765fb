r"""Answers in LaTeX: what stands in \boxed{...}, and an answer without its decoration."""

import re

from tinylora.tasks.scorers.numeric import parse_number

_SPACING = re.compile(r"\\[,!;: ]|\s+")
_UNIT = re.compile(
    r"(.*[0-9])(?:\\[,!;: ]|~|\s)*"
    r"(?:\\(?:text|mathrm|mbox)\s*\{(?!\s*(?:dozen|hundred|thousand|[mbtr]+illion))[^{}]*\}(?:\^\{?[0-9]\}?)?"
    r"|\^\{?\\circ\}?)",
    re.DOTALL,
)
"""What stands before a unit: "18" of "18 \\text{ dollars}", "16" of "16 \\text{ cm}^3", "90" of "90^\\circ"."""


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
    around it; without the unit of a number.
    """
    text = text.strip().removesuffix(".").strip().strip("$")
    unit = _UNIT.fullmatch(text)
    if unit and parse_number(number := _SPACING.sub("", unit[1]).replace("\\$", "")) is not None:
        return number
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text)
    text = re.sub(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = text.replace("{,}", ",").replace(r"\$", "").replace(r"\%", "%").removesuffix("%")
    text = _SPACING.sub("", text)
    braced = re.fullmatch(r"\{([^{}]*)\}", text)
    return braced[1] if braced else text
