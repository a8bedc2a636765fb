"""Replies before and after for the report: some drawn at random, and the worst regressions. Text made safe to show."""

import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST_CHARACTERS = 600
"""Of a text that is shown; the middle of a longer one is left out, and says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One item, answered by the untrained model and by the adapter."""

    question: str
    answer: str
    before: str
    after: str
    before_right: bool
    after_right: bool
    before_stopped: bool
    after_stopped: bool


def shown(text: str, most: int = MOST_CHARACTERS) -> str:
    """Text with its control characters made visible, its middle left out where it is long. Not yet escaped for HTML."""
    if len(text) > most:
        half = most // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character in "\n\t":
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's pictures of control characters
    if code == 0x7F:
        return "\u2421"
    # Directions, joiners and private use could change how the rest of a line is read; a lone surrogate is no text.
    return f"[U+{code:04X}]" if unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs") else character


def random_pairs(sides: tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]], count: int, seed: int) -> list[Pair]:
    """`count` items drawn without looking at the answers; the same seed draws the same ones."""
    base, tuned = sides
    places = random.Random(seed).sample(range(len(base)), min(count, len(base)))
    return [_pair(base[i], tuned[i]) for i in sorted(places)]


def regressions(sides: tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]], count: int) -> list[Pair]:
    """Items that were right and no longer are: those that do not even stop first, then the longest replies."""
    lost = [(b, t) for b, t in zip(*sides, strict=True) if b["strict"] >= 1 > t["strict"]]
    lost.sort(key=lambda pair: (bool(pair[1]["stopped"]), -int(pair[1]["num_tokens"])))
    return [_pair(b, t) for b, t in lost[:count]]


def _pair(base: dict[str, Any], tuned: dict[str, Any]) -> Pair:
    return Pair(
        question=shown(str(base["question"])),
        answer=shown(str(base["answer"])),
        before=shown(str(base["text"])),
        after=shown(str(tuned["text"])),
        before_right=base["strict"] >= 1,
        after_right=tuned["strict"] >= 1,
        before_stopped=bool(base["stopped"]),
        after_stopped=bool(tuned["stopped"]),
    )
