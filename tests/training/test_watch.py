"""The early word about noise: p of several steps together, and when it is said."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import combine_pvalues

from tinylora.training.watch import NOISE_STEPS, Watch, together


def step(p: float) -> dict[str, Any]:
    return {
        "zero_variance_groups": 0.2, "truncated": 0.0, "answered": 1.0, "reward": 0.4, "signal_p": p,
    }  # fmt: skip


def test_together_is_fisher_s_method() -> None:
    generator = np.random.default_rng(0)
    for n in (1, 3, 10):
        ps = list(generator.random(n))
        assert together(ps) == pytest.approx(combine_pvalues(ps, "fisher").pvalue, rel=1e-9)


def test_steps_that_are_noise_together_are_told_and_weak_signals_are_not() -> None:
    watch = Watch(max_logprob_gap=0.1)
    said = [watch.step(step(0.5)) for _ in range(2 * NOISE_STEPS)]
    assert [bool(words) for words in said] == ([False] * (NOISE_STEPS - 1) + [True]) * 2
    assert "cannot be told from noise" in said[NOISE_STEPS - 1][0]
    watch = Watch(max_logprob_gap=0.1)
    assert not any(watch.step(step(0.2)) for _ in range(3 * NOISE_STEPS))  # none alone, all of them together
    assert not any(watch.step({k: v for k, v in step(0.5).items() if k != "signal_p"}) for _ in range(30))
