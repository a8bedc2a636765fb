r"""Answers in LaTeX: what stands in \boxed{...}, and an answer without its decoration."""

import re


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
    r"""An answer without what LaTeX adds to its looks: $, \$, \%, spacing, \left, \dfrac, \text{...}, a period."""
    text = text.strip().removesuffix(".").strip().strip("$")
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text)
    text = re.sub(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = text.replace("{,}", ",").replace(r"\$", "").replace(r"\%", "%").removesuffix("%")
    return re.sub(r"\\[,!;: ]|\s+", "", text)
