"""Slots as JSON: the values that a message gives for a fixed set of names."""

import ast
import json
import re
from typing import Any

from tinylora.errors import UserError
from tinylora.tasks.base import shorten
from tinylora.tasks.scorers.json_text import json_objects
from tinylora.tasks.scorers.text import TextScorer

SLOTS = ("date", "time", "people", "first_name", "last_name")
_LONGEST = 4000
"""Longest piece of a reply that is read as a loosely written object."""


class SlotsScorer(TextScorer):
    """strict: the reply is one JSON object, nothing before or behind it, with exactly the answer's keys and values.

    value_only: the last object in the reply has them, read leniently: single quotes and a comma too many are fine,
    case, spacing and punctuation at the ends of a value are ignored, null and "" stand for a key that is not there, and
    a number is its text.
    slots: right slots by all slots that the answer or the reply names (1 where neither names any).
    """

    def parse(self, text: str) -> str | None:
        """The reply if all of it is one JSON object, or None."""
        return text.strip() if _whole(text) is not None else None

    def score(self, answer: str, text: str) -> dict[str, float]:
        """strict, value_only and slots, as the class says."""
        gold = json.loads(answer)
        strict = _whole(text) == gold
        found = _last_object(text)
        if found is None:
            return {"strict": 0.0, "value_only": 0.0, "slots": 0.0}
        want, given = _plain(gold), _plain(found)
        names = want.keys() | given.keys()
        right = sum(name in want and want[name] == given.get(name) for name in names)
        value = right == len(names)
        return {
            "strict": float(strict),
            "value_only": float(strict or value),
            "slots": 1.0 if strict else right / len(names) if names else 1.0,
        }

    def check_answer(self, answer: str) -> None:
        """Raises: UserError unless the answer is a JSON object of texts."""
        gold = _whole(answer)
        if gold is None or not all(isinstance(value, str) for value in gold.values()):
            raise UserError(
                f"scorer slots: the answer {shorten(answer)} is no JSON object of texts; "
                'write it as {"name": "value"}, or take the scorer json-fields'
            )


def _whole(text: str) -> dict[str, Any] | None:
    text = text.strip()
    for value, start, end in json_objects(text):
        return value if start == 0 and end == len(text) else None
    return None


def _last_object(text: str) -> dict[Any, Any] | None:
    """The last JSON object; where there is none, the last {...} without inner braces that reads as Python's."""
    found = None
    for found, _, _ in json_objects(text):  # noqa: B007 (only the last object is wanted)
        pass
    if found is not None:
        return found
    for piece in reversed(re.findall(r"\{[^{}]*\}", text)):
        if len(piece) > _LONGEST:
            continue
        try:
            value = ast.literal_eval(re.sub(r"\bnull\b", "None", piece))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return None


def _plain(slots: dict[Any, Any]) -> dict[str, str]:
    plain = {}
    for name, value in slots.items():
        text = " ".join(str(value).casefold().split()).strip(" .,;:!?") if value is not None else ""
        if text:
            plain[str(name)] = text
    return plain
