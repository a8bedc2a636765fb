"""The `eval` workflow: the untrained model and an adapter on the same items, by every measure side by side.

"Right" is a score of 1; a scorer that gives parts of a point is counted by full points only, so that McNemar's test
holds. Both answer under the same prompt, budget and random numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tinylora.errors import UserError
from tinylora.evaluation.items import read_untrained, write_items
from tinylora.evaluation.protocol import protocol_of
from tinylora.evaluation.statistics.paired import PairedResult, Share, paired_result
from tinylora.models.fingerprint import identify
from tinylora.rollouts.replies import Reply
from tinylora.rollouts.runtime import Runtime
from tinylora.system import progress
from tinylora.talk import Say

MEASURES = ("strict", "value_only", "stopped")
LABELS = {"strict": "strict", "value_only": "value only", "stopped": "stopped"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came out. The measures pair the same items in the same order."""

    headline: str
    """What is compared, in one sentence."""
    strict: PairedResult
    value_only: PairedResult
    stopped: PairedResult
    untrained: tuple[Reply, ...]
    adapter: tuple[Reply, ...]
    names: tuple[str, str] = ("untrained", "adapter")
    protocol: str = ""
    """Hash of all that decides a score besides the model (`evaluation/protocol.py`)."""

    def to_json(self) -> dict[str, Any]:
        """Everything that `text` prints, for machines; not the items."""
        measures = {name: _measure_json(getattr(self, name)) for name in MEASURES}
        mean_tokens = {"base": _mean_tokens(self.untrained), "tuned": _mean_tokens(self.adapter)}
        return {
            "compared": self.headline,
            "sides": list(self.names),
            "num_items": len(self.untrained),
            "protocol": self.protocol,
            **measures,
            "mean_tokens": mean_tokens,
        }

    def text(self) -> str:
        """Lines for people; the first says what is compared."""
        lines = [self.headline, f"{'':<11} {self.names[0]:<30} {self.names[1]:<30} difference"]
        for name in MEASURES:
            result: PairedResult = getattr(self, name)
            low, high = result.interval
            lines.append(
                f"{LABELS[name]:<11} {_share(result.base):<30} {_share(result.tuned):<30} "
                f"{100 * result.difference:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}); {result.won} won, "
                f"{result.lost} lost, p = {result.p_value:.2g}"
            )
        tokens = _mean_tokens(self.untrained), _mean_tokens(self.adapter)
        lines.append(f"{'tokens':<11} {tokens[0]:<30.1f} {tokens[1]:<30.1f} mean, stop included")
        lines.append("shares with 95 % Wilson intervals, differences with Newcombe's, p by exact McNemar, two-sided")
        return "\n".join(lines)


def base_id(runtime: Runtime) -> str:
    """The fingerprint of the model that is loaded, which `--other-base` lets be another than the adapter's."""
    with runtime.adapter.using(None):  # of the base alone, without a method's layers
        return identify(runtime.base.model, runtime.base.files).fingerprint.hex()


def compare(
    runtime: Runtime,
    v: Tensor,
    *,
    label: str | Path,
    against: Tensor | None = None,
    num_items: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
    untrained: Path | None = None,
    base_id: str = "",
    say: Say,
) -> Comparison:
    """Evaluate v = 0 and `v` (groups, u) on the first `num_items` test items (0: the config's eval.num_test, or all).

    against: another vector to compare with, instead of v = 0: the same numbers, of which `v` is a rounding.
    untrained: a file of the untrained model's replies, which are taken from it if it is there and else written to it;
    base_id tells bases apart there.

    Raises: UserError if v does not fit the model, the task has no such items, a scorer fails, or the file holds the
    replies of something else.
    """
    runtime.adapter.check_shape(v)
    check_num_items(num_items)
    config = runtime.config
    every = runtime.task.items("test")
    items = every[: num_items or config.eval.num_test or len(every)]
    how = "greedy" if temperature == 0 else f"sampled at temperature {temperature:g} (seed {seed})"
    sides = f"the untrained {config.model.name} with {label}"
    if against is not None:
        sides = f"{label} on {config.model.name} with itself, rounded (|change of v| {float((v - against).norm()):.2g})"
    headline = (
        f"comparing {sides} ({v.numel():,} trained numbers, "
        f"|v| {float(v.norm()):.3g}) on the same {len(items):,} test items of {runtime.task.name}, {how}, at most "
        f"{config.generation.max_new_tokens} tokens"
    )
    say(headline)

    def run(vector: Tensor | None, who: str) -> tuple[Reply, ...]:
        tell = None if progress.is_on() else lambda done, total: say(f"{who}: {done}/{total} items")
        return tuple(runtime.answer(items, vector, temperature=temperature, seed=seed, on_progress=tell, who=who))

    names = ("untrained", "adapter") if against is None else ("adapter", "rounded")
    protocol = protocol_of(config, runtime.task, items, temperature=temperature, seed=seed)
    # The engine and the dtype round differently, so replies of another one are no partner in a paired comparison.
    about = {"protocol": protocol, "base": base_id, "engine": runtime.engine.name, "dtype": config.model.dtype}
    kept = read_untrained(untrained, about, [one.id for one in items]) if untrained is not None else None
    if kept is not None:
        say(f"the untrained model's replies are taken from {untrained}")
    first = kept or run(against, names[0])
    if untrained is not None and kept is None:  # before the adapter answers: other evaluations wait for it
        write_items(untrained, {"untrained": first}, about)
    return replace(from_results(headline, first, run(v, names[1])), names=names, protocol=protocol)


def check_num_items(num_items: int) -> None:
    """Raises: UserError for less than 0 items."""
    if num_items < 0:
        raise UserError(f"--num-items must be at least 1, or 0 for the recipe's own number, got {num_items}")


def from_results(headline: str, untrained: Sequence[Reply], adapter: Sequence[Reply]) -> Comparison:
    """The comparison of two lists of results. Raises: UserError if they are not of the same items in the same order."""
    if [r.item_id for r in untrained] != [r.item_id for r in adapter]:
        raise UserError("a paired comparison needs the same items in the same order on both sides")

    def paired(name: str) -> PairedResult:
        before, after = ([float(getattr(r, name)) >= 1.0 for r in side] for side in (untrained, adapter))
        return paired_result(before, after)

    return Comparison(
        headline=headline,
        strict=paired("strict"),
        value_only=paired("value_only"),
        stopped=paired("stopped"),
        untrained=tuple(untrained),
        adapter=tuple(adapter),
    )


def _share(share: Share) -> str:
    low, high = share.interval()
    return f"{share.correct}/{share.total} = {100 * share.value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _mean_tokens(results: Sequence[Reply]) -> float:
    return sum(r.num_tokens for r in results) / len(results)


def _measure_json(result: PairedResult) -> dict[str, Any]:
    sides = {
        name: {"correct": share.correct, "total": share.total, "interval": list(share.interval())}
        for name, share in (("base", result.base), ("tuned", result.tuned))
    }
    return {
        **sides,
        "won": result.won,
        "lost": result.lost,
        "p_value": result.p_value,
        "difference": result.difference,
        "interval": list(result.interval),
    }
