"""Intervals and tests against statsmodels, scipy's permutation test, published values and simulation."""

from math import comb

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from tinylora.errors import UserError
from tinylora.evaluation.statistics.paired import (
    Share,
    mcnemar_exact,
    paired_interval,
    paired_result,
    pooled_result,
    sign_flip_p_value,
    wilson_interval,
)

Bools = NDArray[np.bool_]


def table(both: int, won: int, lost: int, neither: int) -> tuple[Bools, Bools]:
    """(base, tuned) with these counts."""
    base = np.repeat([True, False, True, False], [both, won, lost, neither])
    tuned = np.repeat([True, True, False, False], [both, won, lost, neither])
    return base, tuned


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (1, 7), (433, 1000), (1, 1)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_wilson_is_statsmodels(correct: int, total: int, level: float) -> None:
    want = proportion_confint(correct, total, alpha=1 - level, method="wilson")
    np.testing.assert_allclose(wilson_interval(correct, total, level), want, rtol=1e-10, atol=1e-12)
    assert Share(correct, total).interval(level) == wilson_interval(correct, total, level)


@pytest.mark.parametrize("counts", [(90, 32, 7, 127), (5, 0, 3, 2), (0, 1, 0, 0), (40, 12, 12, 3), (300, 60, 20, 620)])
def test_mcnemar_is_statsmodels(counts: tuple[int, int, int, int]) -> None:
    both, won, lost, neither = counts
    base, tuned = table(*counts)
    got = mcnemar_exact(base, tuned)
    assert got[:2] == (won, lost)
    assert got[2] == pytest.approx(mcnemar([[both, lost], [won, neither]], exact=True).pvalue, rel=1e-10)


def test_mcnemar_of_a_case_solved_by_hand() -> None:
    # 32 won, 7 lost: two-sided tail of a fair coin over 39 tosses.
    by_hand = 2 * sum(comb(39, k) for k in range(8)) / 2**39
    assert mcnemar_exact(*table(90, 32, 7, 127))[2] == pytest.approx(by_hand, rel=1e-10)
    assert by_hand == pytest.approx(7e-5, rel=0.1)
    assert mcnemar_exact(*table(3, 0, 0, 4)) == (0, 0, 1.0)  # nothing changed: no evidence


# Newcombe 1998 (n = 50), Bentur 2009 and Cavo 2012 as computed by R's contingencytables: correlation with and without
# continuity correction, and a small table.
@pytest.mark.parametrize(
    ("counts", "want"),
    [
        ((36, 12, 2, 0), (0.0569, 0.3404)),
        ((1, 1, 7, 12), (-0.507, -0.026)),
        ((59, 6, 16, 80), (-0.1186, -0.0046)),
    ],
)
def test_paired_interval_gives_published_values(counts: tuple[int, int, int, int], want: tuple[float, float]) -> None:
    np.testing.assert_allclose(paired_interval(*table(*counts)), want, atol=6e-4 if counts[0] == 1 else 6e-5)


def test_paired_interval_agrees_with_a_bootstrap_on_many_items() -> None:
    base, tuned = table(600, 250, 150, 1000)
    change = tuned.astype(float) - base
    boot = stats.bootstrap((change,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1))
    got = paired_interval(base, tuned)
    np.testing.assert_allclose(got, boot.confidence_interval, atol=2e-3)
    assert got[0] < change.mean() < got[1]


def test_paired_interval_is_symmetric_and_never_empty() -> None:
    base, tuned = table(30, 9, 4, 57)
    low, high = paired_interval(base, tuned)
    np.testing.assert_allclose(paired_interval(tuned, base), (-high, -low), rtol=1e-12)
    for counts in [(0, 0, 0, 20), (20, 0, 0, 0), (0, 20, 0, 0), (0, 0, 20, 0), (10, 0, 0, 10)]:
        low, high = paired_interval(*table(*counts))
        assert -1 - 1e-9 <= low < high <= 1 + 1e-9


def test_paired_interval_covers() -> None:
    # 95 % within 2,000 draws: standard error 0.5 %, so a right interval fails this about once in 1e6 runs at 92.5 %.
    rng = np.random.default_rng(2)
    shares = np.array([0.2, 0.12, 0.06, 0.62])
    hits = 0
    for counts in rng.multinomial(150, shares, size=2000).tolist():
        low, high = paired_interval(*table(*counts))
        hits += low <= shares[1] - shares[2] <= high
    assert 0.925 < hits / 2000 < 0.975


def test_paired_result_holds_it_all() -> None:
    base, tuned = table(90, 32, 7, 127)
    result = paired_result(base, tuned)
    assert (result.base, result.tuned, result.won, result.lost) == (Share(97, 256), Share(122, 256), 32, 7)
    assert result.difference == pytest.approx(result.tuned.value - result.base.value)
    assert result.text() == (
        "37.9 -> 47.7 % of 256 (+9.8 points, 95 % interval +5.1 to +14.4; 32 won, 7 lost, exact McNemar p = 7e-05)"
    )


def random_seeds(rng: np.random.Generator, seeds: int, items: int) -> tuple[Bools, list[Bools]]:
    base = rng.random(items) < 0.4
    return base, [np.where(rng.random(items) < 0.3, rng.random(items) < 0.7, base) for _ in range(seeds)]


def test_pooling_one_seed_is_mcnemar() -> None:
    base, (tuned,) = random_seeds(np.random.default_rng(3), 1, 300)
    pooled = pooled_result([(base, tuned)])
    assert pooled.p_value == pytest.approx(mcnemar_exact(base, tuned)[2], rel=1e-10)
    assert pooled.naive_p_value == mcnemar_exact(base, tuned)[2]


def test_sign_flip_is_every_flip() -> None:
    rng = np.random.default_rng(4)
    for _ in range(10):
        differences = rng.integers(-3, 4, size=11)
        flips = np.array(np.meshgrid(*[[-1, 1]] * 11)).reshape(11, -1)  # all 2048
        want = np.mean(np.abs(differences @ flips) >= abs(differences.sum()))
        assert sign_flip_p_value(differences) == pytest.approx(want, rel=1e-12)


def test_pooled_p_is_scipys_permutation_test() -> None:
    rng = np.random.default_rng(5)
    base, tuned = random_seeds(rng, 3, 200)
    pooled = pooled_result([(base, t) for t in tuned])
    by_item = np.sum([t.astype(int) - base.astype(int) for t in tuned], axis=0)
    want = stats.permutation_test(
        (by_item,), np.sum, permutation_type="samples", n_resamples=20_000, vectorized=True, batch=1000, rng=rng
    ).pvalue
    assert pooled.p_value == pytest.approx(want, abs=4 * np.sqrt(want * (1 - want) / 20_000) + 1e-4)
    assert pooled.won == sum(r.won for r in pooled.per_seed) == int(sum((t & ~base).sum() for t in tuned))
    assert pooled.lost == int(sum((base & ~t).sum() for t in tuned))
    assert pooled.difference == pytest.approx(by_item.mean() / 3)
    assert pooled.interval is not None and pooled.interval[0] < pooled.difference < pooled.interval[1]
    assert "3 seeds on the same 200 items" in pooled.text()


def test_copies_of_one_seed_are_no_new_evidence() -> None:
    base, (tuned,) = random_seeds(np.random.default_rng(6), 1, 400)
    one, three = pooled_result([(base, tuned)]), pooled_result([(base, tuned)] * 3)
    assert three.p_value == pytest.approx(one.p_value, rel=1e-9)
    assert three.interval == pytest.approx(one.interval)
    assert three.naive_p_value < one.naive_p_value / 10  # what the caveat is about


def test_pooled_without_any_change() -> None:
    base = np.array([True, False, True])
    pooled = pooled_result([(base, base), (base, base)])
    assert (pooled.p_value, pooled.naive_p_value, pooled.interval) == (1.0, 1.0, None)
    assert pooled.text() == "2 seeds on the same 3 items: +0.0 points; 0 won, 0 lost, item-level sign-flip p = 1"


def test_bad_input_is_one_clear_sentence() -> None:
    base = np.array([True, False])
    with pytest.raises(UserError, match="needs at least one item, got none for base"):
        mcnemar_exact(np.array([], dtype=bool), base)
    with pytest.raises(UserError, match="got 2 for base, 1 for tuned"):
        paired_result(base, base[:1])
    with pytest.raises(UserError, match=r"one bool an item .* got float64 of shape \(2,\) for tuned"):
        paired_interval(base, np.array([1.0, 0.5]))
    with pytest.raises(UserError, match=r"shape \(1, 2\) for base"):
        mcnemar_exact(base[None], base)
    with pytest.raises(UserError, match="at least one item, got 0"):
        wilson_interval(0, 0)
    with pytest.raises(UserError, match="from 0 to 4"):
        wilson_interval(5, 4)
    with pytest.raises(UserError, match="level must lie between 0 and 1"):
        wilson_interval(1, 4, level=95)
    with pytest.raises(UserError, match="at least one seed"):
        pooled_result([])
    with pytest.raises(UserError, match="same items, got 1, 2 items"):
        pooled_result([(base, base), (base[:1], base[:1])])
