"""Any reasoning-gym task by name: distinct questions generated from a seed, and the task's own scorer.

Item i of seed s is, in most of its tasks, item i + 1 of seed s - 1. So batches take seeds a whole batch apart, the
first one from a hash of task name and seed (else seeds 0 and 1 would share all but one question), and splits go by
the question's hash and never by seed.
"""

import dataclasses
import hashlib
import importlib
import logging
import re
import time
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from tinylora.errors import UserError
from tinylora.tasks.base import Item, shorten
from tinylora.tasks.scorers.evaluated import Kind, how_evaluated, may_be_evaluated
from tinylora.tasks.scorers.latex import last_boxed
from tinylora.tasks.scorers.numeric import last_number
from tinylora.tasks.scorers.text import Scorer
from tinylora.tasks.split import question_id
from tinylora.tasks.split_task import SplitItems, json_able, required_splits, split_by_hash

_log = logging.getLogger(__name__)

SLOW_SECONDS = 10.0
"""After this long a warning says that the task generates slowly."""
_SLOW = "%s makes its questions slowly: %s of %s after %.0f s; a smaller task.num_items takes less time"
BATCH = 1000
"""Draws between two looks at whether anything new still comes."""
EMPTY_BATCHES = 3
"""Whole batches in a row without a new question after which the task is taken to be exhausted."""
MAX_DRAWS_PER_ITEM = 20
"""Draws for each of num_items after which the search for new questions ends."""


def gym() -> Any:
    """The package reasoning_gym, imported late: it takes a second.

    The first import compiles its dependencies, and Python warns of their source (cellpylib's `is "recursive"`). A user
    can do nothing about that.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        return importlib.import_module("reasoning_gym")


class Source:
    """One reasoning-gym task with its options: generates, and scores by the task's own rule.

    Raises: UserError for an unknown name (with close ones) and for options that the task refuses.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        DATASETS = gym().factory.DATASETS
        if name not in DATASETS:
            close = get_close_matches(name, DATASETS, n=5, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else f"there are {len(DATASETS)}, such as chain_sum"
            raise UserError(f"reasoning-gym has no task {name!r}; {hint}")
        config_class = DATASETS[name][1]
        allowed = [f.name for f in dataclasses.fields(config_class) if f.name not in ("seed", "size")]
        for option in options:
            if option in ("seed", "size"):
                setting = "task.seed" if option == "seed" else "task.num_items"
                raise UserError(f"task.options.{option} is set by {setting}; take it out of task.options")
            if option not in allowed:
                close = get_close_matches(option, allowed, n=1)
                raise UserError(
                    f"reasoning-gym task {name} has no option {option!r}"
                    + (f", did you mean {close[0]!r}?" if close else "")
                    + f" It has: {', '.join(allowed)}"
                )
        self.name = name
        self._options = dict(options)
        self._dataset = self._create(seed=0)
        composed = name == "composite"  # of other tasks, with any of their rules
        self._evaluated: Kind = "mathematics" if composed else how_evaluated(type(self._dataset).score_answer)
        self.entries: dict[str, dict[str, Any]] = {}
        """What the task made, by question id: its own scorer reads the metadata in there."""

    def generate(self, num_items: int, seed: int) -> tuple[list[Item], int]:
        """At most `num_items` distinct questions and the number of repeats; equal arguments give equal items.

        Ends early when EMPTY_BATCHES whole batches bring nothing new or after MAX_DRAWS_PER_ITEM * num_items draws.
        """
        if num_items < 1:
            raise UserError(f"task.num_items must be at least 1, got {num_items}")
        first_seed = int(hashlib.sha256(f"{self.name}:{seed}".encode()).hexdigest()[:7], 16)
        items: dict[str, Item] = {}
        draws = empty_batches = 0
        started, told = time.monotonic(), False
        while empty_batches < EMPTY_BATCHES and draws < MAX_DRAWS_PER_ITEM * num_items:
            dataset = self._create(seed=first_seed + draws)
            before = len(items)
            for index in range(BATCH):
                item = self._item(dataset, index)
                draws += 1
                if not told and time.monotonic() - started > SLOW_SECONDS:
                    told = True
                    _log.warning(_SLOW, self.name, len(items), num_items, SLOW_SECONDS)
                if items.setdefault(item.id, item) is item and len(items) == num_items:
                    return list(items.values()), draws - len(items)
            empty_batches = empty_batches + 1 if len(items) == before else 0
        return list(items.values()), draws - len(items)

    def score_answer(self, item: Item, answer: str) -> float:
        """The task's own score of an answer, in [0, 1]; some tasks give partial credit.

        Some tasks' rules raise on an answer that they cannot read (prime_factorization on "5 x 7"). That is a wrong
        answer, 0, and no reason to end a run; a rule that cannot take the task's own answer either is broken.
        Some evaluate the answer as Python: they are given no answer in place of one that is more than plain values or
        mathematics (scorers/evaluated.py).
        Raises: what such a rule raises.
        """
        entry = self.entries[item.id]
        if not may_be_evaluated(answer, self._evaluated):
            answer = ""
        try:
            return float(self._dataset.score_answer(answer, entry))
        except Exception:
            self._dataset.score_answer(entry["answer"], entry)
            return 0.0

    def _item(self, dataset: Any, index: int) -> Item:
        try:
            entry = dataset[index]
        except Exception as error:
            raise self._refused(error) from error
        question, answer = entry["question"], entry["answer"]
        item = Item(
            question_id(question),
            question,
            "" if answer is None else str(answer),
            json_able(entry.get("metadata", {})),
        )
        self.entries.setdefault(item.id, entry)
        return item

    def _create(self, seed: int) -> Any:
        try:
            return gym().create_dataset(self.name, seed=seed, size=BATCH, **self._options)
        except Exception as error:  # options are checked by assert, and by whatever a wrong type trips over
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> UserError:
        options = ", ".join(f"{name} = {value!r}" for name, value in self._options.items()) or "none"
        return UserError(
            f"reasoning-gym task {self.name} refuses its options ({options}): {str(error) or type(error).__name__}"
        )


class ReasoningGymScorer(Scorer):
    r"""The task's own rule, for tasks with more than one right answer or with partial credit.

    style says what the answer is: "whole" the whole reply, "tags" what stands in the last <answer>...</answer>,
    "boxed" what stands in the last \boxed{...}. strict: that answer gets the full score 1. value_only: so does it, or
    the content of tags or box, the last line, or the last number. task_score: the score of that answer, partial credit
    included (0 without one).
    """

    needs_answer = False

    def __init__(self, source: Source, style: str = "whole") -> None:
        if style not in ("whole", "tags", "boxed"):
            raise UserError(f"scorer reasoning-gym: style must be 'whole', 'tags' or 'boxed', got {style!r}")
        self._source = source
        self._style = style

    def parse(self, text: str) -> str | None:
        """The answer as `style` says, or None."""
        if self._style == "whole":
            return text.strip() or None
        return _tagged(text) if self._style == "tags" else _stripped(last_boxed(text))

    def reads(self, item: Item) -> Any:
        """What the task's rule may look at."""
        return dict(item.metadata)

    def score_item(self, item: Item, text: str) -> dict[str, float]:
        """Calls the task's rule up to six times."""
        answer = self.parse(text)
        task_score = 0.0 if answer is None else self._source.score_answer(item, answer)
        number = last_number(text)
        candidates = (
            text.strip(),
            _tagged(text),
            _stripped(last_boxed(text)),
            text.strip().rpartition("\n")[2].strip(),
            None if number is None else format(number, "f"),
        )
        value = task_score >= 1 or any(
            self._source.score_answer(item, candidate) >= 1 for candidate in dict.fromkeys(candidates) if candidate
        )
        return {"strict": float(task_score >= 1), "value_only": float(value), "task_score": task_score}


def _stripped(text: str | None) -> str | None:
    return text.strip() or None if text is not None else None


def _tagged(text: str) -> str | None:
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return _stripped(found[-1]) if found else None


def load(source: Source, num_items: int, seed: int, validation_share: float, test_share: float) -> SplitItems:
    """Generated items, split by hash."""
    items, repeats = source.generate(num_items, seed)
    splits = split_by_hash(items, validation_share, test_share)
    return SplitItems(splits, duplicates=repeats, required=required_splits(validation_share, test_share))


def own_scorer(source: Source | None, options: Mapping[str, Any]) -> Scorer:
    """The scorer `reasoning-gym` of a source. Raises: UserError where the task is none of reasoning-gym's."""
    if source is None:
        raise UserError("the scorer reasoning-gym scores reasoning-gym tasks only; set task.name to reasoning_gym:NAME")
    unknown = [name for name in options if name != "style"]
    if unknown:
        raise UserError(f"scorer reasoning-gym has no option {shorten(unknown[0])}; it has: style")
    return ReasoningGymScorer(source, **options)
