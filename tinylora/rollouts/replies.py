"""A reply to an item, and its scores: the record from which every reported number is made."""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np

from tinylora.errors import UserError
from tinylora.generation.types import Completion
from tinylora.models.base import BaseModel
from tinylora.models.text import text_of
from tinylora.tasks.base import Item, ScorerError, Task, shorten


@dataclass(frozen=True, slots=True)
class Reply:
    """One completion of one item. `strict` is 0 when it was cut off at the token budget; `value_only` is kept."""

    item_id: str
    question: str
    answer: str
    text: str
    strict: float
    value_only: float
    stopped: bool
    num_tokens: int
    scores: dict[str, float]
    answered: bool = False
    """Whether an answer in the asked-for format could be read."""
    token_ids: tuple[int, ...] = field(default=(), repr=False)
    """As they were drawn, stop token included; empty for a reply that was read back or written by hand."""
    logprobs: tuple[float, ...] = field(default=(), repr=False)
    """Of each token under the engine at the run's temperature, as the learner computes them."""
    prompt_tokens: int = field(default=0, repr=False)
    """Of its prompt; 0 where that was not kept."""

    def row(self) -> dict[str, Any]:
        """What files keep of it, in the order of the fields: all but the tokens."""
        return {name: getattr(self, name) for name in FIELDS}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """A reply that a file kept; what else stands in the row is left out. Raises: UserError as `check_row`."""
        check_row(row)
        return cls(**{name: row[name] for name in FIELDS})


FIELDS = tuple(one.name for one in fields(Reply) if one.name not in ("token_ids", "logprobs", "prompt_tokens"))
"""What files keep of a reply."""


def check_row(row: Mapping[str, Any]) -> None:
    """Whether a file's row holds what a reply can be. Raises: UserError for a score that none can be, and the like."""
    for name in ("strict", "value_only"):
        if not is_score(row[name]) or not 0 <= row[name] <= 1:
            raise UserError(f"the score {name} must be a number from 0 to 1, got {shorten(repr(row[name]), 60)}")
    scores = row["scores"]
    if not isinstance(scores, Mapping) or not all(is_score(value) for value in scores.values()):
        raise UserError(f"scores must be named finite numbers, got {shorten(repr(scores), 60)}")
    for name in ("strict", "value_only"):
        allowed = {scores.get(name), 0.0} if name == "strict" and row["stopped"] is False else {scores.get(name)}
        if name in scores and row[name] not in allowed:
            raise UserError(f"the score {name} is {row[name]} beside {scores[name]} among all scores")
    if row["strict"] and row["stopped"] is not True:
        raise UserError(f"strict is {row['strict']} for a reply that was cut off")
    tokens = row["num_tokens"]
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
        raise UserError(f"num_tokens must be a whole number of at least 0, got {shorten(repr(tokens), 60)}")
    for name, kind in (("item_id", str), ("text", str), ("stopped", bool), ("answered", bool)):
        if not isinstance(row[name], kind):
            raise UserError(f"{name} must be of type {kind.__name__}, got {shorten(repr(row[name]), 60)}")


def is_score(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def decode(base: BaseModel, completion: Completion) -> str:
    """The completion's text without special tokens."""
    return text_of(base, completion.token_ids)


def stop_at(base: BaseModel, stop_strings: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """For Request.should_stop: whether one of the texts stands at the end of the tokens so far; None without texts.

    Only the last tokens are decoded, special ones too: a token that shows is at least a byte of text.
    """
    if not stop_strings:
        return None
    tail = max(len(text.encode()) for text in stop_strings) + 8

    def should_stop(token_ids: list[int]) -> bool:
        text = text_of(base, token_ids[-tail:], special=True)
        return any(stop in text for stop in stop_strings)

    return should_stop


def cut_at(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first of the stop strings in it."""
    ends = [text.find(stop) for stop in stop_strings if stop in text]
    return text[: min(ends)] if ends else text


def score_completion(
    base: BaseModel,
    task: Task,
    item: Item,
    completion: Completion,
    stop_strings: Sequence[str] = (),
    prompt_tokens: int = 0,
) -> Reply:
    """Score one completion, cut at the first stop string. Raises: ScorerError, with the item, if the scorer fails."""
    stopped = completion.finish_reason == "stop"
    text = cut_at(decode(base, completion), stop_strings)
    scored = score_text(task, item, text, stopped=stopped, num_tokens=len(completion.token_ids))
    return replace(scored, token_ids=completion.token_ids, logprobs=completion.logprobs, prompt_tokens=prompt_tokens)


def score_text(task: Task, item: Item, text: str, *, stopped: bool, num_tokens: int) -> Reply:
    """Score a reply as it stands. Raises: ScorerError, which shows the item, if the scorer fails."""
    try:
        scores = task.score(item, text)
        answered = task.parse(text) is not None
    except UserError:
        raise
    except Exception as error:  # of a task that is not ours; ours raise ScorerError themselves
        raise ScorerError(f"the scorer raised {type(error).__name__}: {error}", item, text) from error
    missing = {"strict", "value_only"} - set(scores)
    if missing:
        raise ScorerError(f"no score {', '.join(sorted(missing))} was given", item, text)
    wrong = {name: value for name, value in scores.items() if not math.isfinite(value)}
    if wrong:
        raise ScorerError(f"scores must be finite, got {wrong}", item, text)
    return Reply(
        item_id=item.id,
        question=item.question,
        answer=item.answer,
        text=text,
        strict=scores["strict"] if stopped else 0.0,
        value_only=scores["value_only"],
        stopped=stopped,
        num_tokens=num_tokens,
        scores=scores,
        answered=answered,
    )


def correct(results: Sequence[Reply], score: str = "strict") -> np.ndarray:
    """Bool array: which completions are right (a score of 1) under `strict` or `value_only`."""
    return np.array([getattr(result, score) >= 1.0 for result in results], dtype=bool)


def mean(results: Sequence[Reply], score: str) -> float:
    """Mean of strict, value_only, stopped or num_tokens."""
    return float(np.mean([float(getattr(result, score)) for result in results]))


def draw_key(item: Item) -> int:
    """The number that names an item in the random draws: from its id, which is a hash in our own tasks."""
    digest = item.id if re.fullmatch(r"[0-9a-f]{15,}", item.id) else hashlib.sha256(item.id.encode()).hexdigest()
    return int(digest[:15], 16)
