"""A task without the items that `task.skip` names: those that do not fit, and any by their ids.

Every other item is as it was: its split, its place in the order of the data, its random draws.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinylora.errors import UserError
from tinylora.rollouts.order import DataOrder
from tinylora.tasks.base import SPLITS, Item, Message, Split, Task
from tinylora.tasks.config import TOO_LONG

Reasons = Callable[[Split, Sequence[Item]], Mapping[int, str]]
"""By their places among these items: why some do not fit."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """One item that is left out."""

    split: Split
    item: Item
    why: str

    def row(self) -> dict[str, str]:
        """As skipped.jsonl keeps it."""
        return {"split": self.split, "item": self.item.id, "question": self.item.question, "why": self.why}


class TaskWithoutSkipped:
    """The task, whose `items` lack some; what a split lacks is found when it is asked for."""

    def __init__(self, task: Task, skip: Sequence[str], reasons: Reasons) -> None:
        self._task, self._reasons, self.name = task, reasons, task.name
        self._too_long = TOO_LONG in skip
        self._ids = tuple(one for one in skip if one != TOO_LONG)
        self._left: dict[Split, tuple[Item, ...]] = {}
        self._skipped: dict[Split, tuple[Skipped, ...]] = {}
        self._check_ids()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)  # what a task may have beside the protocol, such as a fingerprint

    def prompt(self, item: Item) -> list[Message]:
        """The task's own."""
        return self._task.prompt(item)

    def parse(self, text: str) -> str | None:
        """The task's own."""
        return self._task.parse(text)

    def score(self, item: Item, text: str) -> dict[str, float]:
        """The task's own."""
        return self._task.score(item, text)

    def items(self, split: Split) -> Sequence[Item]:
        """Items of a split that are left. Raises: UserError if none is."""
        if split not in self._left:
            every = self._task.items(split)
            why = dict(self._reasons(split, every)) if self._too_long else {}
            why |= {i: "named in task.skip" for i, item in enumerate(every) if item.id.startswith(self._ids or (" ",))}
            if len(why) == len(every):
                raise UserError(f"task.skip leaves none of the {len(every)} {split} items: {next(iter(why.values()))}")
            self._skipped[split] = tuple(Skipped(split, every[i], why[i]) for i in sorted(why))
            self._left[split] = tuple(item for i, item in enumerate(every) if i not in why)
        return self._left[split]

    def every(self, split: Split) -> Sequence[Item]:
        """All items of a split, those that are skipped among them."""
        return self._task.items(split)

    def skipped(self, split: Split) -> Sequence[Skipped]:
        """What a split lacks."""
        self.items(split)
        return self._skipped[split]

    def known_skipped(self) -> list[Skipped]:
        """What the splits lack that were asked for so far."""
        return [one for split in SPLITS for one in self._skipped.get(split, ())]

    @property
    def ids(self) -> frozenset[str]:
        """Of the train items that are left out."""
        return frozenset(one.item.id for one in self.skipped("train"))

    def _check_ids(self) -> None:
        if not self._ids:
            return
        known = []
        for split in SPLITS:
            try:
                known += [item.id for item in self._task.items(split)]
            except UserError:  # a split without items
                continue
        if unknown := [one for one in self._ids if not any(item.startswith(one) for item in known)]:
            raise UserError(f"task.skip names {', '.join(unknown)}, and no item of the task has such an id")


def skipped_in_words(task: Task, split: Split) -> str:
    """A sentence about what task.skip leaves out of a split; empty if that is nothing."""
    found = task.skipped(split) if isinstance(task, TaskWithoutSkipped) else ()
    if not found:
        return ""
    shown = "; ".join(f"{one.item.id[:12]} ({one.why})" for one in found[:3])
    more = f"; and {len(found) - 3:,} more" if len(found) > 3 else ""
    return f"task.skip leaves out {len(found):,} {split} items: {shown}{more}"


def data_order(task: Task, seed: int) -> DataOrder:
    """The order in which training takes a task's items; skipped ones keep their places in it."""
    if isinstance(task, TaskWithoutSkipped):
        return DataOrder(task.every("train"), seed, skipped=task.ids)
    return DataOrder(task.items("train"), seed)
