"""A task: items, their prompt, a parser and a scorer. Pure functions of text; no model, no device."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tinylora.errors import UserError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Item:
    """One question with its gold answer. `id` is a hash of the question text, so equal questions are one item."""

    id: str
    question: str
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def is_blank(text: str) -> bool:
    """Whether there is nothing to see: white space, zero-width and other format characters, fillers, lone marks."""
    return all(c in _FILLERS or unicodedata.category(c) in _UNSEEN for c in text)


_FILLERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
_UNSEEN = ("Zs", "Zl", "Zp", "Cc", "Cf", "Mn", "Me")


class Task(Protocol):
    """What training and evaluation need to know of a task."""

    name: str

    def items(self, split: Split) -> Sequence[Item]:
        """Items of one split, in a fixed order; no question stands in two splits."""
        ...

    def prompt(self, item: Item) -> list[Message]:
        """Chat messages (system, few-shot turns, question) for one item."""
        ...

    def parse(self, text: str) -> str | None:
        """The answer given in the asked-for format, or None."""
        ...

    def score(self, item: Item, text: str) -> dict[str, float]:
        """Named scores in [0, 1]; always holds `strict` (asked-for format, right) and `value_only` (right anywhere)."""
        ...


class ScorerError(UserError):
    """A scorer failed on a reply. Training stops with it: a crash is never a zero reward.

    `item` and `reply` are those it failed on, in full; the message shows them shortened.
    """

    def __init__(self, reason: str, item: Item, reply: str) -> None:
        self.item = item
        self.reply = reply
        super().__init__(
            f"scoring failed: {reason} (item {item.id[:12]}, question {shorten(item.question)}, "
            f"answer {shorten(item.answer)}, reply {shorten(reply)})"
        )


def shorten(text: str, limit: int = 200) -> str:
    """`text` quoted on one line, its middle cut out when it is longer than `limit` characters."""
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]} [...{len(text) - 2 * half:,} characters...] {text[-half:]}"
    return repr(text)
