"""Shares and paired comparisons as plain data, the same in result.json and evidence.json."""

from collections.abc import Sequence
from typing import Any

from tinylora.evaluation.statistics.paired import paired_result, wilson_interval
from tinylora.rollouts.replies import Reply, correct


def share_json(results: Sequence[Reply], score: str = "strict") -> dict[str, Any]:
    """How many are right, of how many, with the Wilson interval."""
    right = int(correct(results, score).sum())
    return {"correct": right, "total": len(results), "interval": list(wilson_interval(right, len(results)))}


def paired_json(base: Sequence[Reply], tuned: Sequence[Reply], score: str = "strict") -> dict[str, Any]:
    """Two conditions on the same items: shares, won, lost, p, difference, interval, and the line for people."""
    paired = paired_result(correct(base, score), correct(tuned, score))
    return {
        "base": {"correct": paired.base.correct, "total": paired.base.total},
        "tuned": {"correct": paired.tuned.correct, "total": paired.tuned.total},
        "won": paired.won,
        "lost": paired.lost,
        "p_value": paired.p_value,
        "difference": paired.difference,
        "interval": list(paired.interval),
        "text": paired.text(),
    }
