"""Mathematical expressions by the math-verify library: 1/2, 0.5 and \\frac{1}{2} are one answer.

The library limits its time by SIGALRM, so it works in the main thread only, and a comparison can take seconds. A reply
that it cannot read, or not in time, is wrong: that is a property of the reply. Time-outs have a score of their own,
because they depend on the machine's speed, so that they show.
"""

import threading
from typing import Any

from tinylora.errors import UserError
from tinylora.tasks.base import shorten
from tinylora.tasks.scorers.latex import last_boxed
from tinylora.tasks.scorers.math_golds import is_marked, is_simple, misread, read_gold
from tinylora.tasks.scorers.text import TextScorer


class MathVerifyScorer(TextScorer):
    r"""strict: the last \boxed{...} equals the answer; value_only: strict, or what the library finds in the reply does.

    timed_out: 1 if reading or comparing took longer than `timeout_seconds` (whole seconds).
    """

    def __init__(self, timeout_seconds: int = 5) -> None:
        if isinstance(timeout_seconds, bool) or not isinstance(timeout_seconds, int) or timeout_seconds < 1:
            raise UserError(
                f"scorer math-verify: timeout_seconds must be a whole number of at least 1, got {timeout_seconds!r}"
            )
        self.timeout_seconds = timeout_seconds

    def parse(self, text: str) -> str | None:
        r"""What stands in the last \boxed{...}, or None."""
        content = last_boxed(text)
        return content.strip() or None if content is not None else None

    def score(self, answer: str, text: str) -> dict[str, float]:
        """Raises: UserError for an answer that the library cannot read, and outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            raise UserError("scorer math-verify works in the main thread only (the library uses signals)")
        gold = read_gold(answer, self.timeout_seconds)
        boxed = self.parse(text)
        bare = boxed.removesuffix(".") if boxed else ""  # the library does not read \boxed{42.}
        strict, late_strict = self._equal(gold, rf"\boxed{{{bare}}}") if bare else (False, False)
        value, late_value = (True, False) if strict else self._equal(gold, text)
        return {
            "strict": float(strict),
            "value_only": float(value),
            "timed_out": float(late_strict or late_value),
        }

    def check_answer(self, answer: str) -> None:
        """Raises: UserError for an answer that the library cannot read, reads as something else, or never finds equal
        to its own copy. Outside the main thread no time limit holds while it is read.
        """
        answer = answer.strip()
        if is_simple(answer):
            return
        gold = read_gold(answer, self.timeout_seconds)
        meant = misread(answer, gold)
        if meant:
            raise UserError(
                f"scorer math-verify: the answer {shorten(answer)} is {meant}, which the library reads as "
                f"{shorten(str(gold[0]), 80)}; write it as mathematics, or take the scorer exact"
            )
        copy = answer if is_marked(answer) else rf"\boxed{{{answer}}}"
        equal, late = self._equal(gold, copy)
        if not equal and not late:
            raise UserError(
                f"scorer math-verify: the answer {shorten(answer)} does not equal its own copy, as the library reads "
                f"it ({shorten(str(gold[0]), 80)}), so no reply could be right; write it as mathematics, or take the "
                "scorer exact"
            )

    def check_published(self, answer: str) -> None:
        """A look at thousands of LaTeX answers takes minutes: of a public set's only those beyond ASCII get it."""
        if not answer.isascii():
            self.check_answer(answer)

    def _equal(self, gold: tuple[Any, ...], text: str) -> tuple[bool, bool]:
        """(equal, timed out). The library's TimeoutException is a BaseException, hence named apart."""
        from math_verify import parse, verify
        from math_verify.errors import TimeoutException

        try:
            limit = self.timeout_seconds if threading.current_thread() is threading.main_thread() else None
            given = parse(text, parsing_timeout=limit, raise_on_error=True)
            return verify(list(gold), given, timeout_seconds=limit, raise_on_error=True), False
        except TimeoutException:
            return False, True
        except Exception:  # what sympy raises for text that is no mathematics has no common class
            return False, False
