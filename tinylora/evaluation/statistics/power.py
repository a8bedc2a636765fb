"""What a comparison could have shown, and p values of several comparisons together."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np
from scipy import optimize, stats

from tinylora.errors import UserError


def smallest_effect(num_items: int, discordant: float, *, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """Smallest difference of two shares that McNemar's test on `num_items` pairs would find with the given power.

    discordant: share of items on which both sides differ (won + lost) / items, as observed. With z = normal quantiles,
    the difference d solves sqrt(n) d = z(1 - alpha / 2) sqrt(discordant) + z(power) sqrt(discordant - d^2)
    (Connor 1987, Biometrics 43, 207-211). A difference is never above the discordant share, so None means that not even
    a change of all of these in one direction would have been found. No discordant item is taken as one.
    Raises: UserError for no items, or shares outside their range.
    """
    if num_items < 1:
        raise UserError(f"num_items must be at least 1, got {num_items}")
    if not 0 <= discordant <= 1 or not 0 < alpha < 1 or not 0 < power < 1:
        raise UserError(
            f"discordant must lie in [0, 1], alpha and power between 0 and 1, got {discordant}, {alpha}, {power}"
        )
    share = max(discordant, 1 / num_items)
    z_alpha, z_power = float(stats.norm.ppf(1 - alpha / 2)), float(stats.norm.ppf(power))

    def gap(difference: float) -> float:
        needed = z_alpha * sqrt(share) + z_power * sqrt(max(share - difference**2, 0.0))
        return sqrt(num_items) * difference - needed

    if gap(share) < 0:
        return None
    return float(optimize.brentq(gap, 0.0, share))


def smallest_json(num_items: int, discordant: float, *, alpha: float = 0.05, power: float = 0.8) -> dict[str, Any]:
    """`smallest_effect` as evidence.json has it, with a sentence."""
    least = smallest_effect(num_items, discordant, alpha=alpha, power=power)
    what = f"{num_items:,} items, of which {100 * discordant:.1f} % changed,"
    chance = f"with a chance of {100 * power:.0f} %"
    text = (
        f"{what} show a difference of {100 * least:.1f} points or more {chance}"
        if least is not None
        else f"{what} are too few to show any difference {chance}"
    )
    return {"difference": least, "power": power, "alpha": alpha, "discordant": discordant, "text": text}


def adjusted_p_values(p_values: Sequence[float]) -> list[float]:
    """Benjamini-Hochberg adjusted p values of comparisons that are read together, in the order given.

    Among those below 0.05, at most 5 % are expected to be chance. Source: Benjamini and Hochberg 1995; scipy's.
    """
    return [float(p) for p in stats.false_discovery_control(np.asarray(p_values), method="bh")] if p_values else []
