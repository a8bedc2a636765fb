"""How long random vectors are, and what they are then called. No torch: the report's pages are made of this, too."""

from collections.abc import Mapping, Sequence
from typing import Any

LENGTHS = (1.0, 0.5, 0.25, 0.125)
"""Norms of random vectors, as shares of the trained one's, in turn: those of the full norm may break the model, and are
no opponents then.
"""


def random_label(index: int, length: float) -> str:
    """What the random vector of that index (from 0) and length is called."""
    return f"random vector {index + 1} of {_norm(length)}"


def randoms_in_words(randoms: Sequence[Mapping[str, Any]]) -> str:
    """The entries under result.json's `random`, by length; earlier versions wrote none and had the full norm."""
    shares: dict[float, list[str]] = {}
    for one in randoms:
        shares.setdefault(one.get("length", 1.0), []).append(f"{100 * one['correct'] / one['total']:.1f} %")
    return "; ".join(f"{', '.join(found)} of {_norm(length)}" for length, found in shares.items())


def _norm(length: float) -> str:
    return "the same norm" if length == 1 else f"{length:g} x the norm"
