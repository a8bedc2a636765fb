"""A task: items, their prompt, a parser and a scorer. Pure functions of text; no model, no device."""

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


class TaskSettings(Protocol):
    """What `build_task` reads of a task's configuration; any object with these attributes will do."""

    @property
    def name(self) -> str:
        """A public set (gsm8k, banking77, ...), jsonl or reasoning_gym:NAME."""
        ...

    @property
    def path(self) -> str:
        """File (jsonl) or folder (public sets); empty for none."""
        ...

    @property
    def options(self) -> Mapping[str, Any]:
        """Options of a reasoning-gym task, or of a public set that has some."""
        ...

    @property
    def num_items(self) -> int:
        """Distinct questions to generate at most."""
        ...

    @property
    def seed(self) -> int:
        """Seed of generated items."""
        ...

    @property
    def scorer(self) -> str:
        """A scorer's name, or module:function."""
        ...

    @property
    def scorer_options(self) -> Mapping[str, Any]:
        """Options of the scorer."""
        ...

    @property
    def validation_share(self) -> float:
        """Share of questions for validation."""
        ...

    @property
    def test_share(self) -> float:
        """Share of questions for the test."""
        ...


class PromptSettings(Protocol):
    """What `build_task` reads of a prompt's configuration. How messages become tokens is the caller's business."""

    @property
    def system(self) -> str:
        """System prompt; empty for none."""
        ...

    @property
    def template(self) -> str:
        """User turn; {question} is replaced."""
        ...

    @property
    def pattern(self) -> str:
        """Regular expression whose first group replaces the question in the prompt; empty for none."""
        ...

    @property
    def few_shot(self) -> Sequence[Mapping[str, str]]:
        """Solved examples: question, answer."""
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
