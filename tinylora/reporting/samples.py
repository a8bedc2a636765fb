"""Replies for people to read: drawn at random, or the worst that got lost; hostile text made harmless to look at."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tinylora.reporting.run_files import Row
from tinylora.talk import harmless

MOST_CHARACTERS = 1200
"""Of a text that is shown; the middle of a longer one is left out, with a count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One model's answer to an item."""

    text: str
    right: bool
    value_right: bool
    stopped: bool
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One item, answered by the untrained model and by the adapter."""

    item_id: str
    question: str
    gold: str
    before: Reply
    after: Reply

    @property
    def change(self) -> str:
        """won, lost, right (both) or wrong (both), by the strict score."""
        if self.before.right != self.after.right:
            return "won" if self.after.right else "lost"
        return "right both times" if self.after.right else "wrong both times"


def shown(text: str, most: int = MOST_CHARACTERS) -> str:
    """Text with control characters made visible and the middle of a long one left out. Not escaped for HTML.

    Line ends and tabs stay. Control characters become Unicode's pictures of them; what would turn the direction of a
    line, hide itself or be no character at all becomes its number.
    """
    if len(text) > most:
        head, tail = most - most // 3, most // 3
        text = f"{text[:head]} [... {len(text) - head - tail:,} characters left out ...] {text[-tail:]}"
    return harmless(text)


def random_pairs(sides: tuple[Sequence[Row], Sequence[Row]], count: int, seed: int) -> list[Pair]:
    """`count` items drawn without a look at the answers. The seed and the items decide, not the order in the file."""
    pairs = sorted(zip(*sides, strict=True), key=lambda pair: str(pair[0]["item_id"]))
    return [_pair(*pair) for pair in random.Random(seed).sample(pairs, min(count, len(pairs)))]


def regressions(sides: tuple[Sequence[Row], Sequence[Row]], count: int) -> list[Pair]:
    """Items that were right and no longer are: those whose reply never stops first, then the longest replies."""
    lost = [(b, t) for b, t in zip(*sides, strict=True) if b["strict"] >= 1 > t["strict"]]
    lost.sort(key=lambda pair: (bool(pair[1]["stopped"]), -int(pair[1]["num_tokens"]), str(pair[1]["item_id"])))
    return [_pair(*pair) for pair in lost[:count]]


def _pair(base: Row, tuned: Row) -> Pair:
    return Pair(
        item_id=shown(str(base["item_id"]), 80),
        question=shown(str(base["question"])),
        gold=shown(str(base["answer"])),
        before=_reply(base),
        after=_reply(tuned),
    )


def _reply(row: Row) -> Reply:
    return Reply(
        text=shown(str(row["text"])),
        right=row["strict"] >= 1,
        value_right=row["value_only"] >= 1,
        stopped=bool(row["stopped"]),
        num_tokens=int(row["num_tokens"]),
    )
