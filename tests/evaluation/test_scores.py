"""Scores over samples, the split of a gain, power: against enumeration, simulation and cases solved by hand."""

from dataclasses import dataclass
from itertools import combinations
from math import isclose

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests

from tinylora.errors import UserError
from tinylora.evaluation.statistics.paired import bootstrap_difference
from tinylora.evaluation.statistics.power import adjusted_p_values, smallest_effect
from tinylora.evaluation.statistics.scores import majority_correct, pass_at_k, repetition
from tinylora.evaluation.statistics.split_gain import factors, split_gain
from tinylora.training.watch import Watch


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(case: tuple[int, int, int]) -> None:
    n, c, k = case
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert isclose(pass_at_k(n, c, k), sum(map(any, subsets)) / len(subsets), abs_tol=1e-12)


@pytest.mark.parametrize("case", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_refuses_what_has_no_meaning(case: tuple[int, int, int]) -> None:
    with pytest.raises(UserError):
        pass_at_k(*case)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["3", "4", "4"], [False, True, True], 1.0),
        (["3", "3", "4"], [False, False, True], 0.0),
        (["3", "4"], [False, True], 0.5),  # a tie
        ([None, None, "4"], [False, False, True], 1.0),  # what cannot be read does not vote
        ([None, None], [False, False], 0.0),
    ],
)
def test_majority(answers: list[str | None], correct: list[bool], expected: float) -> None:
    assert majority_correct(answers, correct) == expected
    with pytest.raises(UserError, match="one verdict an answer"):
        majority_correct(answers, [*correct, True])


def test_repetition() -> None:
    assert repetition("") == repetition("one two three") == repetition("a b c d e f g h") == 0
    assert repetition("yes " * 100) == pytest.approx(1 - 1 / 97)
    assert repetition("x" * 1_000_000) > 0.99
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)


@dataclass
class R:
    stopped: bool
    answered: bool
    strict: float


def replies(cut: int, unread: int, wrong: int, right: int) -> list[R]:
    return (
        [R(False, True, 0.0)] * cut + [R(True, False, 0.0)] * unread + [R(True, True, 0.0)] * wrong
        + [R(True, True, 1.0)] * right
    )  # fmt: skip


counts = st.tuples(*[st.integers(0, 6)] * 4).filter(any)


@given(counts, counts)
def test_the_parts_of_a_gain_add_up(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    base, tuned = replies(*before), replies(*after)
    split = split_gain(base, tuned)
    share = lambda side: sum(r.strict >= 1 for r in side) / len(side)  # noqa: E731
    assert split.total == pytest.approx(share(tuned) - share(base), abs=1e-12)
    assert split.stops + split.format + split.value == pytest.approx(split.total, abs=1e-12)


def test_a_gain_of_one_kind_is_called_so() -> None:
    base = replies(cut=50, unread=10, wrong=20, right=20)
    stops = split_gain(base, replies(cut=0, unread=20, wrong=40, right=40))
    assert (stops.stops, stops.format, stops.value) == pytest.approx((0.2, 0, 0), abs=1e-12)
    formatted = split_gain(base, replies(cut=50, unread=0, wrong=25, right=25))
    assert (formatted.stops, formatted.format, formatted.value) == pytest.approx((0, 0.05, 0), abs=1e-12)
    skill = split_gain(base, replies(cut=50, unread=10, wrong=10, right=30))
    assert (skill.stops, skill.format, skill.value) == pytest.approx((0, 0, 0.1), abs=1e-12)
    assert factors(replies(cut=3, unread=0, wrong=0, right=0)).format is None
    with pytest.raises(UserError, match="at least one item"):
        split_gain([], base)


@pytest.mark.parametrize(("items", "discordant"), [(200, 0.3), (1000, 0.08), (400, 1.0)])
def test_the_smallest_effect_is_found_as_often_as_it_says(items: int, discordant: float) -> None:
    """By simulation: with that difference the exact test, a bit conservative, rejects in about 80 % of the cases."""
    difference = smallest_effect(items, discordant)
    assert difference is not None
    rng = np.random.default_rng(0)
    changed = rng.binomial(items, discordant, size=1000)
    won = rng.binomial(changed, (discordant + difference) / (2 * discordant))
    found = [n > 0 and binomtest(int(w), int(n)).pvalue < 0.05 for w, n in zip(won, changed, strict=True)]
    assert 0.70 < np.mean(found) < 0.86


def test_too_few_items_show_nothing() -> None:
    assert smallest_effect(20, 0.1) is None
    with pytest.raises(UserError, match="num_items"):
        smallest_effect(0, 0.1)
    with pytest.raises(UserError, match="discordant"):
        smallest_effect(10, 1.1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_adjusted_p_values_are_those_of_statsmodels(p_values: list[float]) -> None:
    assert adjusted_p_values(p_values) == pytest.approx(list(multipletests(p_values, method="fdr_bh")[1]), abs=1e-12)


def test_bootstrap_of_a_difference() -> None:
    rng = np.random.default_rng(1)
    base = rng.random(300)
    tuned = base + rng.normal(0.1, 0.5, size=300)
    difference, interval = bootstrap_difference(base, tuned)
    assert difference == pytest.approx(float(np.mean(tuned - base)))
    assert interval is not None
    spread = 1.96 * float(np.std(tuned - base)) / 300**0.5
    assert interval == pytest.approx((difference - spread, difference + spread), abs=0.01)
    assert bootstrap_difference(base, base)[1] is None
    for wrong in ([], [1.0, float("nan")], [[1.0]]):
        with pytest.raises(UserError):
            bootstrap_difference(wrong, wrong)


def test_an_early_word_comes_once_and_again_after_it_had_gone() -> None:
    watch = Watch(max_logprob_gap=0.1, patience=3)
    good = {"zero_variance_groups": 0.5, "reward": 0.3, "truncated": 0.1, "answered": 0.9, "sampler_gap": 0.001}
    silent = good | {"zero_variance_groups": 1.0, "reward": 0.0}
    assert [watch.step(silent) for _ in range(2)] == [[], []]
    (word,) = watch.step(silent)
    assert word.startswith("3 steps in a row: every reward of a prompt is the same") and "easier task" in word
    assert watch.step(silent) == []
    assert watch.step(good) == []
    assert [len(watch.step(silent | {"reward": 1.0})) for _ in range(3)] == [0, 0, 1]
    others = good | {"truncated": 0.95, "answered": 0.0, "sampler_gap": 0.06}
    said = [watch.step(others) for _ in range(3)][-1]
    assert len(said) == 3 and "max_new_tokens" in said[0] and "format" in said[1] and "0.060" in said[2]
