"""What a paired comparison says: intervals and tests over the same items answered before and after training.

All arrays are one bool per item (True = correct), the same item at the same place in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from tinylora.errors import UserError

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Share:
    """`correct` of `total` items."""

    correct: int
    total: int

    def __post_init__(self) -> None:
        if self.total < 1:
            raise UserError(f"a share needs at least one item, got {self.total}; evaluate on more items")
        if not 0 <= self.correct <= self.total:
            raise UserError(f"correct must be from 0 to {self.total} (the items), got {self.correct}")

    @property
    def value(self) -> float:
        """correct / total."""
        return self.correct / self.total

    def interval(self, level: float = 0.95) -> Interval:
        """Wilson interval of the share."""
        return wilson_interval(self.correct, self.total, level)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedResult:
    """The untrained model (base) and the trained one (tuned) on the same items."""

    base: Share
    tuned: Share
    won: int
    """Items only the tuned model gets right."""
    lost: int
    """Items only the base model gets right."""
    p_value: float
    """Exact two-sided McNemar."""
    difference: float
    """tuned - base share, from -1 to 1."""
    interval: Interval
    """Newcombe's interval of the difference, at `level`."""
    level: float = 0.95

    def text(self) -> str:
        """One line for people."""
        low, high = self.interval
        return (
            f"{100 * self.base.value:.1f} -> {100 * self.tuned.value:.1f} % of {self.base.total}"
            f" ({100 * self.difference:+.1f} points,"
            f" {100 * self.level:g} % interval {100 * low:+.1f} to {100 * high:+.1f};"
            f" {self.won} won, {self.lost} lost, exact McNemar p = {self.p_value:.2g})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledResult:
    """Several trained models (one a seed) on the same items, against the base."""

    per_seed: tuple[PairedResult, ...]
    won: int
    lost: int
    """Discordant pairs summed over seeds. An item may be counted once a seed."""
    naive_p_value: float
    """Exact McNemar of those sums. Too small: it takes the same item in several seeds for independent evidence."""
    p_value: float
    """Exact item-level sign-flip test; the one to report."""
    difference: float
    """Mean over seeds and items of tuned - base."""
    interval: Interval | None
    """Bootstrap over items at `level`; None where all items have the same difference: nothing to resample."""
    level: float = 0.95

    def text(self) -> str:
        """One line for people."""
        seeds, items = len(self.per_seed), self.per_seed[0].base.total
        span = ""
        if self.interval is not None:
            low, high = self.interval
            span = f", {100 * self.level:g} % interval {100 * low:+.1f} to {100 * high:+.1f}"
        return (
            f"{seeds} seeds on the same {items} items: {100 * self.difference:+.1f} points{span};"
            f" {self.won} won, {self.lost} lost, item-level sign-flip p = {self.p_value:.2g}"
        )


def wilson_interval(correct: int, total: int, level: float = 0.95) -> Interval:
    """Wilson's score interval (no continuity correction) of a share, both ends in [0, 1].

    Source: Wilson 1927; computed by scipy.
    Raises: UserError for no items, correct outside 0..total, level outside (0, 1).
    """
    Share(correct, total)
    _check_level(level)
    interval = stats.binomtest(correct, total).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_exact(base_correct: ArrayLike, tuned_correct: ArrayLike) -> tuple[int, int, float]:
    """(won, lost, two-sided p): are items that change as likely to be won as to be lost?

    Exact binomial test of won against won + lost at 1/2; p is 1 where no item changed. Shapes: (items,) bool, twice.
    Source: McNemar 1947; scipy's binomtest. Raises: UserError for empty or unequal inputs or values that are not bool.
    """
    base, tuned = _paired(base_correct, tuned_correct)
    won, lost = int((tuned & ~base).sum()), int((base & ~tuned).sum())
    return won, lost, _two_sided(won, lost)


def paired_interval(base_correct: ArrayLike, tuned_correct: ArrayLike, level: float = 0.95) -> Interval:
    """Interval of tuned - base share over the same items: Newcombe's square-and-add with Wilson limits.

    Deterministic, and of positive width even where no item changed. It is approximate while McNemar's p is exact, so at
    the margin one can exclude 0 while the other does not reach 1 - level.
    Shapes: (items,) bool, twice. Source: Newcombe 1998 (Statistics in Medicine 17, 2635-2650), method 10, which
    takes the correlation with a continuity correction where it is positive.
    Raises: UserError for empty or unequal inputs, values that are not bool, level outside (0, 1).
    """
    base, tuned = _paired(base_correct, tuned_correct)
    both, neither = int((base & tuned).sum()), int((~base & ~tuned).sum())
    won, lost = int((tuned & ~base).sum()), int((base & ~tuned).sum())
    total = base.size
    p_tuned, p_base = (both + won) / total, (both + lost) / total
    low_tuned, high_tuned = wilson_interval(both + won, total, level)
    low_base, high_base = wilson_interval(both + lost, total, level)

    margins = (both + won) * (lost + neither) * (both + lost) * (won + neither)
    covariance = float(both * neither - won * lost)
    if covariance > 0:
        covariance = max(covariance - total / 2, 0.0)
    phi = covariance / sqrt(margins) if margins else 0.0

    def width(tuned_side: float, base_side: float) -> float:
        return sqrt(max(tuned_side**2 - 2 * phi * tuned_side * base_side + base_side**2, 0.0))

    difference = p_tuned - p_base
    low = difference - width(p_tuned - low_tuned, high_base - p_base)
    high = difference + width(high_tuned - p_tuned, p_base - low_base)
    return low, high


def paired_result(base_correct: ArrayLike, tuned_correct: ArrayLike, level: float = 0.95) -> PairedResult:
    """Everything about one comparison. Shapes: (items,) bool, twice. Raises: UserError as `paired_interval`."""
    base, tuned = _paired(base_correct, tuned_correct)
    won, lost, p_value = mcnemar_exact(base, tuned)
    return PairedResult(
        base=Share(int(base.sum()), base.size),
        tuned=Share(int(tuned.sum()), tuned.size),
        won=won,
        lost=lost,
        p_value=p_value,
        difference=(won - lost) / base.size,
        interval=paired_interval(base, tuned, level),
        level=level,
    )


def pooled_result(
    pairs: Sequence[tuple[ArrayLike, ArrayLike]], level: float = 0.95, num_resamples: int = 9999
) -> PooledResult:
    """Several seeds, all evaluated on the same items in the same order.

    Shapes: one pair (base_correct, tuned_correct) a seed, each (items,) bool; the base may be the same every time.

    Items repeat over seeds and their outcomes are correlated, so the item, not the pair, is what counts as evidence:
    - p_value: d_i = sum over seeds of (tuned - base) of item i. Without an effect of training, d_i and -d_i are equally
      likely for each item; the exact two-sided p of sum d_i under all 2^items sign flips is computed by convolution.
      With one seed it is exact McNemar.
    - interval: percentile bootstrap over items (scipy) with a fixed generator.
    Both speak of new items and these very seeds, not of seeds that were not run.
    Raises: UserError for no seed, empty or unequal inputs, values that are not bool, level outside (0, 1).
    """
    if len(pairs) == 0:
        raise UserError("pooling needs the results of at least one seed, got none")
    checked = [_paired(base, tuned) for base, tuned in pairs]
    sizes = sorted({base.size for base, _ in checked})
    if len(sizes) > 1:
        raise UserError(f"every seed must be evaluated on the same items, got {', '.join(map(str, sizes))} items")
    per_seed = tuple(paired_result(base, tuned, level) for base, tuned in checked)
    won, lost = sum(r.won for r in per_seed), sum(r.lost for r in per_seed)
    by_item = np.sum([tuned.astype(np.int64) - base.astype(np.int64) for base, tuned in checked], axis=0)
    return PooledResult(
        per_seed=per_seed,
        won=won,
        lost=lost,
        naive_p_value=_two_sided(won, lost),
        p_value=sign_flip_p_value(by_item),
        difference=float(by_item.mean()) / len(checked),
        interval=_bootstrap_interval(by_item / len(checked), level, num_resamples),
        level=level,
    )


def bootstrap_difference(
    base: ArrayLike, tuned: ArrayLike, level: float = 0.95, num_resamples: int = 9999
) -> tuple[float, Interval | None]:
    """Mean of tuned - base over items, and its percentile bootstrap interval over items (scipy, fixed generator).

    For scores that are no bools, such as the mean of several samples. Shapes: (items,) numbers, twice. The interval is
    None where all items have the same difference: nothing to resample.
    Raises: UserError for empty or unequal inputs, numbers that are not finite, level outside (0, 1).
    """
    before, after = (np.asarray(values, dtype=np.float64) for values in (base, tuned))
    if before.ndim != 1 or before.shape != after.shape or not before.size:
        raise UserError(
            f"a paired comparison needs one number an item on both sides, got shapes {before.shape} and {after.shape}"
        )
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise UserError("a paired comparison needs finite numbers")
    _check_level(level)
    values = after - before
    return float(values.mean()), _bootstrap_interval(values, level, num_resamples)


def sign_flip_p_value(differences: NDArray[np.int64]) -> float:
    """Exact two-sided p of sum(differences) when every item's sign is a fair coin.

    Shapes: (items,) integers -> p in (0, 1]. For the n_k items of size k the signed sum is
    k (2 Binomial(n_k, 1/2) - n_k); the distributions of all sizes are convolved, so nothing is sampled.
    """
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    distribution = np.ones(1)  # over half the distance of the sum from its smallest value: steps of 1
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        if size:
            spread = np.zeros(size * count + 1)
            spread[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
            distribution = np.convolve(distribution, spread)
    reach = distribution.size - 1  # the largest possible |sum|
    sums = 2 * np.arange(reach + 1) - reach
    return min(1.0, float(distribution[np.abs(sums) >= abs(int(differences.sum()))].sum()))


def _bootstrap_interval(values: NDArray[np.float64], level: float, num_resamples: int) -> Interval | None:
    if np.all(values == values[0]):
        return None
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=num_resamples,
        batch=256,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _two_sided(won: int, lost: int) -> float:
    return float(stats.binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def _paired(base_correct: ArrayLike, tuned_correct: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    base, tuned = _bools("base", base_correct), _bools("tuned", tuned_correct)
    if base.size != tuned.size:
        raise UserError(
            f"a paired comparison needs the same items on both sides, got {base.size} for base, {tuned.size} for tuned"
        )
    return base, tuned


def _bools(name: str, values: ArrayLike) -> NDArray[np.bool_]:
    array = np.asarray(values)
    if array.size == 0:
        raise UserError(f"a comparison needs at least one item, got none for {name}; evaluate on more items")
    if array.ndim != 1 or array.dtype != np.bool_:
        raise UserError(
            f"a comparison needs one bool an item (right or wrong), got {array.dtype} of shape {array.shape} for {name}"
        )
    return array


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UserError(f"level must lie between 0 and 1, for example 0.95, got {level}")
