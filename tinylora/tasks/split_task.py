"""The one Task there is: items that were given their splits, a prompt and a scorer. Sources only differ in items."""

import hashlib
import json
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinylora.errors import UserError
from tinylora.tasks.base import SPLITS, Item, Message, ScorerError, Split, is_blank, shorten
from tinylora.tasks.prompt import Prompt
from tinylora.tasks.scorers.text import Scorer
from tinylora.tasks.split import question_id, split_of


@dataclass(frozen=True, slots=True)
class SplitItems:
    """Items by split, with what was dropped on the way."""

    splits: Mapping[Split, Sequence[Item]]
    duplicates: int = 0
    """Rows (or generated draws) whose question stood there already in the same source."""
    overlaps: int = 0
    """Train rows dropped because their question also stands in the source's test file."""
    required: frozenset[Split] = field(default_factory=frozenset)
    """Splits that were asked for, so that none may come out empty."""
    test_only: bool = False
    """A public set that is for evaluation: it has nothing to train on."""
    published: bool = False
    """A public set, whose answers many have read."""


def split_by_hash(items: Sequence[Item], validation_share: float, test_share: float) -> dict[Split, list[Item]]:
    """Items by the hash of their question, each split in the order given."""
    splits: dict[Split, list[Item]] = {split: [] for split in SPLITS}
    for item in items:
        splits[split_of(item.question, validation_share, test_share)].append(item)
    return splits


def required_splits(validation_share: float, test_share: float) -> frozenset[Split]:
    """Splits with a share above zero."""
    shares = zip(SPLITS, (1 - validation_share - test_share, validation_share, test_share), strict=True)
    return frozenset(split for split, share in shares if share > 1e-9)  # 1 - 0.9 - 0.1 is not quite 0


class SplitTask:
    """A task over fixed items.

    Raises: UserError when two splits share a question, when a required split is empty, when an answer is one that the
    scorer can never match, or when a few-shot example is a validation or test question.
    """

    def __init__(self, name: str, items: SplitItems, prompt: Prompt, scorer: Scorer) -> None:
        self.name = name
        self.scorer = scorer
        self._items: dict[Split, tuple[Item, ...]] = {split: tuple(items.splits.get(split, ())) for split in SPLITS}
        self._duplicates = items.duplicates
        self._overlaps = items.overlaps
        self._test_only = items.test_only
        self._published = items.published
        self._prompt = prompt
        home: dict[str, Split] = {}
        for split in SPLITS:
            if split in items.required and not self._items[split]:
                raise UserError(self._empty(split))
            for item in self._items[split]:
                if item.id in home:
                    raise UserError(
                        f"task {name}: the question {shorten(item.question)} stands twice, "
                        f"in {home[item.id]} and {split}"
                    )
                home[item.id] = split
                self._check_answer(item)
        for example in prompt.examples:
            split = home.get(question_id(example["question"]), "train")
            if split != "train":
                raise UserError(
                    f"prompt.few_shot: {shorten(example['question'])} is a {split} question of task {name}; "
                    "take an example from the train split or write one of your own"
                )

    def items(self, split: Split) -> Sequence[Item]:
        """Items of one split, in a fixed order.

        Raises: UserError for another split's name and for a split without questions.
        """
        if split not in SPLITS:
            raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if not self._items[split]:
            raise UserError(self._empty(split))
        return self._items[split]

    def prompt(self, item: Item) -> list[Message]:
        """Chat messages (system, few-shot turns, question) for one item."""
        return self._prompt.messages(item.question)

    def parse(self, text: str) -> str | None:
        """The answer given in the asked-for format, or None."""
        return self.scorer.parse(text)

    def score(self, item: Item, text: str) -> dict[str, float]:
        """Named scores: strict and value_only in [0, 1], others finite.

        Raises: ScorerError, which shows the item, for whatever the scorer raises and for scores out of these ranges.
        """
        try:
            scores = self.scorer.score_item(item, text)
        except UserError as error:
            raise ScorerError(str(error), item, text) from error
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # math-verify's TimeoutException, raised in a user's function, is no Exception
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).name}, line {frame.lineno}"
            raise ScorerError(f"the scorer raised {type(error).__name__}: {error} ({place})", item, text) from error
        for name, value in scores.items():
            if not math.isfinite(value):
                raise ScorerError(f"the score {name!r} must be finite, got {value}", item, text)
        for name in ("strict", "value_only"):
            if name not in scores or not 0 <= scores[name] <= 1:
                raise ScorerError(f"the score {name!r} must lie in [0, 1], got {scores.get(name)}", item, text)
        return scores

    def counts(self) -> dict[str, int]:
        """Distinct questions: in all and per split; `duplicates` and `overlaps` were dropped (see SplitItems)."""
        sizes: dict[str, int] = {split: len(self._items[split]) for split in SPLITS}
        return {
            "distinct": sum(sizes.values()),
            **sizes,
            "duplicates": self._duplicates,
            "overlaps": self._overlaps,
        }

    def describe(self) -> str:
        """One line: "5,222 distinct questions: 3,394 train, 522 validation, 1,306 test"."""
        counts = self.counts()
        line = f"{counts['distinct']:,} distinct questions: " + ", ".join(f"{counts[s]:,} {s}" for s in SPLITS)
        if self._overlaps:
            line += f" ({self._overlaps:,} train rows dropped: their question is in the test file)"
        return line

    def fingerprint(self) -> str:
        """SHA-256 (hex) over splits, questions and answers in order: equal for equal data, so resume can tell."""
        digest = hashlib.sha256()
        for split in SPLITS:
            rows = [[item.id, item.question, item.answer] for item in self._items[split]]
            digest.update(json.dumps([split, rows]).encode())
        return digest.hexdigest()

    def read_beside(self, items: Sequence[Item]) -> str:
        """SHA-256 (hex) over what the scorer reads of these items beside question and answer; empty for nothing."""
        rows = [[item.id, self.scorer.reads(item)] for item in items]
        if all(read is None for _, read in rows):
            return ""
        return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()

    def scorer_prints(self) -> dict[str, str]:
        """What a resumed run compares beside `fingerprint`: what the scorer reads of all items, and its code."""
        everything = [item for split in SPLITS for item in self._items[split]]
        return {"scorer_reads": self.read_beside(everything), "scorer_code": self.scorer.code()}

    def _empty(self, split: Split) -> str:
        if self._test_only and split != "test":
            return (
                f"task {self.name} is for evaluation only and has no {split} split; "
                "train on another task, such as gsm8k, and evaluate with --task"
            )
        counts = ", ".join(f"{len(self._items[s]):,} {s}" for s in SPLITS)
        return (
            f"task {self.name}: no questions left in the {split} split ({counts}); add questions, "
            "or change task.validation_share or task.test_share"
        )

    def _check_answer(self, item: Item) -> None:
        if is_blank(item.answer):
            if self.scorer.needs_answer:
                raise UserError(
                    f"task {self.name}: the question {shorten(item.question)} has no answer, which this scorer needs; "
                    "use a Python function or, for reasoning-gym tasks, the scorer reasoning-gym"
                )
            return
        try:
            check = self.scorer.check_published if self._published else self.scorer.check_answer
            check(item.answer)
        except UserError as error:
            raise UserError(f"task {self.name}, question {shorten(item.question)}: {error}") from error


def json_able(value: Any) -> Any:
    """A copy that `json.dumps` takes: tuples and sets become lists, keys and unknown objects become strings."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): json_able(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_able(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted((json_able(inner) for inner in value), key=repr)
    return str(value)
