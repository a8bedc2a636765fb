"""Named scorers: how a reply is read and compared with the gold answer.

Every scorer gives two scores of 0 or 1 beside any of its own:
  strict      the reply has the asked-for format and the right value
  value_only  the right value stands somewhere reasonable, whatever the format; strict implies it
Their difference tells what a gain is made of: a rise of strict without value_only is format, not skill.

Here are the scorers that need only the text; `math_verify_scorer.py`, `python_scorer.py` and `reasoning_gym.py` hold
the others. Values compare by exact decimal value where both are numbers, else as text.
"""

import re
import unicodedata
from abc import ABC, abstractmethod
from decimal import Decimal
from typing import Any

from tinylora.errors import UserError
from tinylora.system.strict_json import parse_json
from tinylora.tasks.base import Item, is_blank, shorten
from tinylora.tasks.scorers.json_text import json_equal, json_objects, read_json
from tinylora.tasks.scorers.latex import gold_value, last_boxed, plain_latex, same_answer
from tinylora.tasks.scorers.numeric import last_number, parse_number, without_period
from tinylora.tasks.scorers.operand import final_number
from tinylora.tasks.scorers.phrase import has_number, has_phrase, plain_words


class Scorer(ABC):
    """Reads replies and scores them. Pure: the same text gets the same scores, and nothing is kept."""

    needs_answer: bool = True
    """Whether every item must bring a gold answer."""

    @abstractmethod
    def parse(self, text: str) -> str | None:
        """The answer given in the asked-for format, or None."""

    @abstractmethod
    def score_item(self, item: Item, text: str) -> dict[str, float]:
        """Scores of a reply to an item; always holds strict and value_only."""

    def check_answer(self, answer: str) -> None:
        """Raises: UserError for a gold answer that no reply could ever match."""
        return

    def check_published(self, answer: str) -> None:
        """As `check_answer`, for an answer of a public set. Raises: UserError."""
        self.check_answer(answer)

    def reads(self, item: Item) -> Any:
        """What of an item decides its scores beside question and answer, as JSON can hold it; None for nothing."""
        return None

    def code(self) -> str:
        """A digest of the code that scores where that is the user's own; empty for the scorers that are here."""
        return ""


class TextScorer(Scorer):
    """A scorer that needs only the gold answer's text."""

    @abstractmethod
    def score(self, answer: str, text: str) -> dict[str, float]:
        """Scores of a reply `text` against the gold `answer`."""

    def score_item(self, item: Item, text: str) -> dict[str, float]:
        """`score` with the answer of the item."""
        return self.score(item.answer, text)


def _scores(strict: bool, value_only: bool) -> dict[str, float]:
    return {"strict": float(strict), "value_only": float(strict or value_only)}


def _value_anywhere(answer: str, text: str) -> bool:
    """The last number equals the answer where that is a number; else the answer stands in the text, case ignored."""
    gold = parse_number(answer)
    return last_number(text) == gold if gold is not None else _phrase_anywhere(answer, text)


def _phrase_anywhere(answer: str, text: str) -> bool:
    """The answer stands in the text as whole words, case and spacing ignored; one that is a number in any form."""
    if has_phrase(plain_words(text), plain_words(answer)):
        return True
    gold = parse_number(answer)
    return gold is not None and has_number(text, gold)


def _same_value(given: str, answer: str) -> bool:
    """Equal as numbers where both are numbers, else as text without surrounding white space."""
    x, y = parse_number(given, spaced=True), parse_number(answer)
    return given.strip() == answer.strip() if x is None or y is None else x == y


class ExactScorer(TextScorer):
    """strict: the whole reply is the answer (Unicode NFC, surrounding white space ignored).

    value_only: the answer stands in the reply as whole words, case and spacing ignored; for labels that a reply may
    list ("yes or no?") that is lenient, so read it as an upper bound.
    """

    def parse(self, text: str) -> str | None:
        """The whole reply, or None if it is blank."""
        return unicodedata.normalize("NFC", text).strip() or None

    def score(self, answer: str, text: str) -> dict[str, float]:
        """strict and value_only, as the class says."""
        strict = self.parse(text) == unicodedata.normalize("NFC", answer).strip()
        return _scores(strict, _phrase_anywhere(answer, text))


class ContainsScorer(TextScorer):
    """strict: the answer stands in the reply as whole words, as it is written; value_only: case and spacing ignored.

    `parse` gives the whole reply: what was found depends on the answer.
    """

    def parse(self, text: str) -> str | None:
        """The whole reply, or None if it is blank."""
        return unicodedata.normalize("NFC", text).strip() or None

    def score(self, answer: str, text: str) -> dict[str, float]:
        """strict and value_only, as the class says."""
        strict = has_phrase(self.parse(text) or "", unicodedata.normalize("NFC", answer).strip())
        return _scores(strict, _phrase_anywhere(answer, text))


class NumberScorer(TextScorer):
    """Numbers by exact decimal value ("42.0" is "42"; thousands commas are fine).

    strict, style "only": the whole reply is the number, with at most one period behind it.
    strict, style "final": the last line of the reply that is not blank ends with the number, with at most one period
    behind it ("17 + 25 = 42."), and the number is not part of something else ("0 + 42", "5/42", "x42").
    value_only: the last number in the reply equals the answer.
    """

    def __init__(self, style: str = "only") -> None:
        if style not in ("only", "final"):
            raise UserError(f"scorer number: style must be 'only' or 'final', got {style!r}")
        self.style = style

    def parse(self, text: str) -> str | None:
        """The number in the style asked for, as it is written, or None."""
        if self.style == "final":
            return final_number(text)
        bare = without_period(text)
        return bare if parse_number(bare, spaced=True) is not None else None

    def score(self, answer: str, text: str) -> dict[str, float]:
        """strict and value_only, as the class says."""
        gold, given = parse_number(answer), self.parse(text)
        if gold is None:
            self.check_answer(answer)
        return _scores(given is not None and parse_number(given, spaced=True) == gold, last_number(text) == gold)

    def check_answer(self, answer: str) -> None:
        """Raises: UserError unless the answer is a number."""
        if parse_number(answer) is None:
            raise UserError(
                f"scorer number: the answer {shorten(answer)} is not a number; "
                "write it as a plain number, or take another scorer (exact, or math-verify for expressions)"
            )


class BoxedScorer(TextScorer):
    r"""strict: the last \boxed{...} holds the answer, as a number (units ignored) or as text without LaTeX decoration.

    value_only: strict, or the last number of the reply equals the answer; if the answer is no number, it stands in
    the reply as whole words. Expressions that differ in form (1/2, \frac12, 0.5) want math-verify.
    """

    def parse(self, text: str) -> str | None:
        r"""What stands in the last \boxed{...}, or None."""
        content = last_boxed(text)
        return content.strip() or None if content is not None else None

    def check_answer(self, answer: str) -> None:
        r"""Raises: UserError for an answer that its own copy in a box is not, such as one of decoration alone."""
        if is_blank(plain_latex(answer)) or not self.score(answer, rf"\boxed{{{answer}}}")["strict"]:
            raise UserError(
                f"scorer boxed: no box can hold the answer {shorten(answer)}; write it as it stands between the braces "
                r"of \boxed{...}"
            )

    def score(self, answer: str, text: str) -> dict[str, float]:
        """strict and value_only, as the class says."""
        given = self.parse(text)
        strict = given is not None and same_answer(given, answer)
        gold = gold_value(answer)
        return _scores(strict, last_number(text) == gold if gold is not None else _phrase_anywhere(answer, text))


class RegexScorer(TextScorer):
    """strict: the one group of `pattern` (Python's re), at its last match in the reply, holds the answer.

    value_only: strict, or as for boxed. Replies are written by a model: keep the pattern free of nested repeats,
    which can take forever on some texts.
    """

    def __init__(self, pattern: str = "") -> None:
        if not isinstance(pattern, str) or not pattern:
            raise UserError("scorer regex needs scorer_options.pattern, such as 'answer is ([0-9]+)'")
        try:
            self.pattern = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"scorer regex: pattern {pattern!r} is no regular expression ({error})") from error
        if self.pattern.groups != 1:
            raise UserError(
                f"scorer regex: pattern {pattern!r} must have exactly one group (...), has {self.pattern.groups}; "
                "write others as (?:...)"
            )

    def parse(self, text: str) -> str | None:
        """The pattern's group at its last match, or None."""
        found = None
        for match in self.pattern.finditer(text):
            if match.group(1) is not None:
                found = match.group(1).strip()
        return found

    def score(self, answer: str, text: str) -> dict[str, float]:
        """strict and value_only, as the class says."""
        given = self.parse(text)
        strict = given is not None and (_same_value(given, answer) or _same_value(without_period(given), answer))
        return _scores(strict, _value_anywhere(answer, text))


class JsonFieldsScorer(TextScorer):
    """The answer is a JSON object; `fields` names those that count, all of the answer's when it is empty.

    strict: the whole reply is one JSON object and all fields are equal. value_only: they are in the last JSON object
    found anywhere in the reply. fields: the share of equal fields in that object. Other keys of the reply are ignored.
    """

    def __init__(self, fields: list[str] | tuple[str, ...] = ()) -> None:
        if not isinstance(fields, (list, tuple)) or not all(isinstance(name, str) for name in fields):
            raise UserError(f"scorer json-fields: fields must be a list of names, got {fields!r}")
        self.fields = tuple(dict.fromkeys(fields))

    def parse(self, text: str) -> str | None:
        """The reply if all of it is one JSON object, or None."""
        text = text.strip()
        whole = any(start == 0 and end == len(text) for _, start, end in json_objects(text))
        return text if whole else None

    def score(self, answer: str, text: str) -> dict[str, float]:
        """strict and value_only, as the class says; fields too."""
        gold = self._gold(answer)
        found = None
        for found, _, _ in json_objects(text):  # noqa: B007 (only the last object is wanted)
            pass
        if found is None:
            return {"strict": 0.0, "value_only": 0.0, "fields": 0.0}
        equal = [name in found and json_equal(found[name], gold[name]) for name in self.fields or gold]
        scores = _scores(all(equal) and self.parse(text) is not None, all(equal))
        return {**scores, "fields": sum(equal) / len(equal)}

    def check_answer(self, answer: str) -> None:
        """Raises: UserError unless the answer is a JSON object that has the fields, each key once."""
        self._gold(answer)
        try:
            parse_json(answer, parse_float=Decimal, parse_int=Decimal)
        except ValueError as error:
            raise UserError(f"scorer json-fields: the answer {shorten(answer)} is not JSON ({error})") from error

    def _gold(self, answer: str) -> dict[str, Any]:
        read = read_json(answer.strip())
        if read is None or read[1] != len(answer.strip()) or not isinstance(read[0], dict) or not read[0]:
            raise UserError(f"scorer json-fields: the answer {shorten(answer)} is not a JSON object with fields")
        missing = [name for name in self.fields if name not in read[0]]
        if missing:
            raise UserError(
                f"scorer json-fields: the answer {shorten(answer)} lacks the field {missing[0]!r}; "
                "add it to the answer or take it out of scorer_options.fields"
            )
        return read[0]
