"""`tinylora eval RUN --samples K`: several samples an item, so pass@k, majority@k and average@k, both sides paired."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tinylora.errors import UserError
from tinylora.evaluation.compare import check_num_items
from tinylora.evaluation.statistics.paired import Interval, bootstrap_difference
from tinylora.evaluation.statistics.scores import majority_correct, pass_at_k
from tinylora.rollouts.replies import Reply
from tinylora.rollouts.runtime import Runtime
from tinylora.system import progress
from tinylora.talk import Say
from tinylora.tasks.base import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledScore:
    """One score of both sides: means over items, and the paired bootstrap of their difference."""

    name: str
    untrained: float
    adapter: float
    difference: float
    interval: Interval | None
    """None where every item has the same difference."""

    def text(self) -> str:
        """One line for people."""
        span = "the same on every item" if self.interval is None else (
            f"{100 * self.interval[0]:+.1f} to {100 * self.interval[1]:+.1f}"
        )  # fmt: skip
        return (
            f"{self.name:<22} {100 * self.untrained:>6.1f} %   {100 * self.adapter:>6.1f} %   "
            f"{100 * self.difference:+.1f} points ({span})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledComparison:
    """All scores, and the answers they are made of: item after item, its samples in a row."""

    headline: str
    scores: tuple[SampledScore, ...]
    untrained: tuple[Reply, ...]
    adapter: tuple[Reply, ...]

    def text(self) -> str:
        """Lines for people."""
        head = f"{'':<22} {'untrained':>8}   {'adapter':>8}   difference, 95 % bootstrap over items"
        return "\n".join([self.headline, head, *(score.text() for score in self.scores)])

    def to_json(self) -> dict[str, Any]:
        """For machines; not the items."""
        scores = {
            one.name: {
                "base": one.untrained, "tuned": one.adapter, "difference": one.difference, "interval": one.interval,
            }
            for one in self.scores
        }  # fmt: skip
        return {"compared": self.headline, "num_items": len({r.item_id for r in self.untrained}), "scores": scores}


def compare_samples(
    runtime: Runtime,
    v: Tensor,
    *,
    label: str,
    num_samples: int,
    temperature: float,
    num_items: int = 0,
    seed: int = 0,
    say: Say,
) -> SampledComparison:
    """Draw `num_samples` completions of every item from both models, with the same random numbers.

    Raises: UserError for fewer than two samples, greedy decoding (all samples would be one), or a v that does not fit.
    """
    if num_samples < 2 or temperature <= 0:
        raise UserError(
            f"--samples must be at least 2 and --temperature above 0 (greedy samples are all the same), got "
            f"{num_samples} and {temperature:g}"
        )
    check_num_items(num_items)
    runtime.adapter.check_shape(v)
    every = runtime.task.items("test")
    items = every[: num_items or runtime.config.eval.num_test or len(every)]
    headline = (
        f"the untrained {runtime.config.model.name} and {label} on the same {len(items):,} test items of "
        f"{runtime.task.name}, {num_samples} samples each at temperature {temperature:g} (seed {seed}), at most "
        f"{runtime.config.generation.max_new_tokens} tokens"
    )
    say(headline)

    def draw(vector: Tensor | None, who: str) -> list[Reply]:
        tell = None if progress.is_on() else lambda done, total: say(f"{who}: {done}/{total} items")
        return runtime.answer(
            items, vector, num_samples=num_samples, temperature=temperature, seed=seed, on_progress=tell, who=who
        )

    sides = [draw(None, "untrained"), draw(v, "adapter")]
    scores = sampled_scores(runtime.task, sides[0], sides[1], num_samples)
    return SampledComparison(headline=headline, scores=scores, untrained=tuple(sides[0]), adapter=tuple(sides[1]))


def sampled_scores(
    task: Task, untrained: Sequence[Reply], adapter: Sequence[Reply], num_samples: int
) -> tuple[SampledScore, ...]:
    """average@k, pass@1, 2, 4, ... k and majority@k, strict, then average@k and pass@k by value only.

    Each side lists the samples of an item one after the other. Majority votes among answers that `task.parse` reads in
    finished replies. Raises: UserError if the sides are not of the same items.
    """
    groups = [
        [list(side[start : start + num_samples]) for start in range(0, len(side), num_samples)]
        for side in (untrained, adapter)
    ]
    for one, other in zip(*groups, strict=True):
        if {r.item_id for r in (*one, *other)} != {one[0].item_id}:
            raise UserError("a paired comparison needs the same items in the same order on both sides")
    ks = [2**i for i in range(num_samples.bit_length()) if 2**i < num_samples] + [num_samples]
    found = []

    def add(name: str, per_item: Any) -> None:
        before, after = ([float(per_item(group)) for group in side] for side in groups)
        difference, interval = bootstrap_difference(before, after)
        mean_before, mean_after = float(np.mean(before)), float(np.mean(after))
        found.append(
            SampledScore(name=name, untrained=mean_before, adapter=mean_after, difference=difference, interval=interval)
        )

    def right(group: Sequence[Reply], measure: str) -> int:
        return sum(getattr(result, measure) >= 1 for result in group)

    def majority(group: Sequence[Reply]) -> float:
        answers = [task.parse(result.text) if result.stopped else None for result in group]
        return majority_correct(answers, [result.strict >= 1 for result in group])

    add(f"average@{num_samples}", lambda group: right(group, "strict") / num_samples)
    for k in ks[1:]:
        add(f"pass@{k}", lambda group, k=k: pass_at_k(num_samples, right(group, "strict"), k))
    add(f"majority@{num_samples}", majority)
    add(f"value only, average@{num_samples}", lambda group: right(group, "value_only") / num_samples)
    add(f"value only, pass@{num_samples}", lambda group: float(right(group, "value_only") > 0))
    add("stopped", lambda group: sum(result.stopped for result in group) / num_samples)
    return tuple(found)
