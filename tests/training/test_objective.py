"""The objective against NumPy float64 loops, finite differences and its own promises."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinylora.errors import UserError
from tinylora.training.advantages import group_advantages, zero_variance
from tinylora.training.objective import importance_weights, kl_terms, policy_loss

Array = NDArray[np.float64]
ROWS, TOKENS = 6, 7


def batch(seed: int = 0) -> dict[str, Array]:
    """A step of 6 completions, ratios well beyond the clip on both sides, the last completion wholly masked."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(1.0, (ROWS, TOKENS))
    mask = np.arange(TOKENS) < np.array([7, 3, 5, 1, 6, 0])[:, None]
    mask[0, 2] = False  # a hole, not only padding
    return {
        "logprobs": old + rng.normal(0, 0.4, old.shape),
        "old": old,
        "sampler": old + rng.normal(0, 0.5, old.shape),
        "base": old + rng.normal(0, 0.4, old.shape),
        "advantages": np.array([1.3, -0.7, 0.4, -1.1, 0.0, 2.0]),
        "mask": mask,
    }


def reference(
    b: dict[str, Array], normalisation: str, kl_coef: float, cap: float | None
) -> tuple[float, dict[str, float]]:
    """The formula of the papers, one token at a time."""
    rows, sums = [], dict.fromkeys(("tokens", "ratio", "clipped_low", "clipped_high", "base_kl", "importance"), 0.0)
    for i in range(len(b["logprobs"])):
        row = []
        for t in range(TOKENS):
            if not b["mask"][i, t]:
                continue
            gain = b["advantages"][i]
            ratio = np.exp(b["logprobs"][i, t] - b["old"][i, t])
            surrogate = min(ratio * gain, min(max(ratio, 0.8), 1.3) * gain)
            weight = 1.0 if cap is None else min(np.exp(b["old"][i, t] - b["sampler"][i, t]), cap)
            gap = b["base"][i, t] - b["logprobs"][i, t]
            kl = np.exp(gap) - gap - 1
            row.append(-weight * surrogate + kl_coef * kl)
            sums["tokens"] += 1
            sums["ratio"] += ratio
            sums["clipped_low"] += gain < 0 and ratio < 0.8
            sums["clipped_high"] += gain > 0 and ratio > 1.3
            sums["base_kl"] += kl
            sums["importance"] += weight
        rows.append(row)
    if normalisation == "token":
        return sum(map(sum, rows)) / sum(map(len, rows)), sums
    return sum(sum(row) / len(row) for row in rows if row) / len(rows), sums


def ours(
    b: dict[str, Array],
    normalisation: Any = "token",
    kl_coef: float = 0.0,
    cap: float | None = None,
    rows: slice = slice(None),
    logprobs: Tensor | None = None,
    **changes: Any,
) -> tuple[Tensor, dict[str, float]]:
    t = {name: torch.from_numpy(value)[rows] for name, value in b.items()}
    arguments: dict[str, Any] = {
        "logprobs": t["logprobs"] if logprobs is None else logprobs[rows],
        "old_logprobs": t["old"],
        "advantages": t["advantages"],
        "loss_mask": t["mask"],
        "clip_low": 0.2,
        "clip_high": 0.3,
        "normalisation": normalisation,
        "total_tokens": int(b["mask"].sum()),
        "total_completions": len(b["mask"]),
        "sampler_logprobs": None if cap is None else t["sampler"],
        "importance_cap": cap,
        "base_logprobs": t["base"],
        "kl_coef": kl_coef,
    }
    return policy_loss(**(arguments | changes))


@pytest.mark.parametrize("normalisation", ["token", "sequence"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_loss_is_the_formula(normalisation: str, kl_coef: float, cap: float | None) -> None:
    b = batch()
    want, sums = reference(b, normalisation, kl_coef, cap)
    loss, stats = ours(b, normalisation, kl_coef, cap)
    assert loss.item() == pytest.approx(want, rel=1e-12)
    if cap is None:
        del sums["importance"]
    assert {name: stats[name] for name in sums} == pytest.approx(sums, rel=1e-12)
    assert sums["clipped_low"] >= 1 and sums["clipped_high"] >= 1  # else the clip is not tested
    assert stats["completions"] == 5
    others = [reference(b, n, k, c)[0] for n in ("token", "sequence") for k in (0.0, 0.1) for c in (None, 1.5)]
    assert sum(abs(other - want) < 1e-3 for other in others) == 1  # each option matters


@pytest.mark.parametrize("normalisation", ["token", "sequence"])
def test_gradient_is_finite_differences(normalisation: str) -> None:
    b = batch(1)
    logprobs = torch.from_numpy(b["logprobs"].copy()).requires_grad_()
    ours(b, normalisation, 0.1, 1.5, logprobs=logprobs)[0].backward()
    assert logprobs.grad is not None
    for i in range(ROWS):
        for t in range(TOKENS):
            ends = []
            for step in (1e-6, -1e-6):
                moved = b | {"logprobs": b["logprobs"].copy()}
                moved["logprobs"][i, t] += step
                ends.append(reference(moved, normalisation, 0.1, 1.5)[0])
            assert logprobs.grad[i, t].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-8)
    assert torch.count_nonzero(logprobs.grad) == b["mask"].sum()  # the KL reaches clipped tokens too


def test_a_clipped_token_has_no_gradient_and_the_pessimistic_side_does() -> None:
    old = torch.zeros(1, 4, dtype=torch.float64)
    ratio = torch.tensor([[2.0, 0.5, 2.0, 0.5]], dtype=torch.float64)
    for gain, want in [(1.0, [0, -0.5, 0, -0.5]), (-1.0, [2.0, 0, 2.0, 0])]:
        logprobs = ratio.log().requires_grad_()
        loss, stats = policy_loss(
            logprobs, old, torch.tensor([gain], dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool),
            clip_low=0.2, clip_high=0.2, normalisation="token", total_tokens=4, total_completions=1,
        )  # fmt: skip
        loss.backward()
        assert logprobs.grad is not None
        np.testing.assert_allclose(4 * logprobs.grad[0].numpy(), want, rtol=1e-12)
        assert stats["clipped_high"] == (2 if gain > 0 else 0) and stats["clipped_low"] == (2 if gain < 0 else 0)


@pytest.mark.parametrize("normalisation", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_micro_batch_split_moves_nothing(normalisation: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(2)
    for seed in range(20):
        b = batch(seed)
        whole = torch.from_numpy(b["logprobs"].copy()).to(dtype).requires_grad_()
        loss, stats = ours(b, normalisation, 0.1, 1.5, logprobs=whole)
        loss.backward()
        parts = torch.from_numpy(b["logprobs"].copy()).to(dtype).requires_grad_()
        cuts = [0, *sorted(rng.choice(np.arange(1, ROWS), size=rng.integers(1, ROWS), replace=False).tolist()), ROWS]
        total, totals = 0.0, dict.fromkeys(stats, 0.0)
        for start, end in pairwise(cuts):
            part, part_stats = ours(b, normalisation, 0.1, 1.5, rows=slice(start, end), logprobs=parts)
            part.backward()
            total += part.item()
            totals = {name: totals[name] + part_stats[name] for name in totals}
        tolerance: Any = {"rtol": 1e-12, "atol": 1e-15} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
        np.testing.assert_allclose(total, loss.item(), **tolerance)
        assert parts.grad is not None and whole.grad is not None
        np.testing.assert_allclose(parts.grad, whole.grad, **tolerance)
        np.testing.assert_allclose(list(totals.values()), list(stats.values()), **tolerance)


@pytest.mark.parametrize("junk", [float("nan"), float("-inf"), float("inf"), 1e30])
def test_untrained_positions_change_nothing(junk: float) -> None:
    b = batch(3)
    clean = torch.from_numpy(b["logprobs"].copy()).requires_grad_()
    loss, stats = ours(b, "sequence", 0.1, 1.5, logprobs=clean)
    loss.backward()
    dirty = {
        n: np.where(b["mask"], v, junk) if n in ("logprobs", "old", "sampler", "base") else v for n, v in b.items()
    }
    logprobs = torch.from_numpy(dirty["logprobs"]).requires_grad_()
    got, got_stats = ours(dirty, "sequence", 0.1, 1.5, logprobs=logprobs)
    got.backward()
    assert torch.equal(got, loss) and got_stats == stats
    assert logprobs.grad is not None and clean.grad is not None and torch.equal(logprobs.grad, clean.grad)


def test_nan_at_a_trained_position_is_not_hidden() -> None:
    for name in ("logprobs", "old", "sampler", "base"):
        b = batch(4)
        b[name][0, 0] = np.nan
        assert torch.isnan(ours(b, "token", 0.1, 1.5)[0])


def test_a_masked_completion_counts_as_stated() -> None:
    b = batch(5)
    shorter = {name: value[:-1] for name, value in b.items()}  # without the masked completion
    assert torch.equal(ours(b, "token")[0], ours(shorter, "token")[0])
    np.testing.assert_allclose(ours(b, "sequence")[0] * ROWS, ours(shorter, "sequence")[0] * (ROWS - 1), rtol=1e-12)
    b["mask"][:] = False
    for normalisation in ("token", "sequence"):
        logprobs = torch.from_numpy(b["logprobs"].copy()).requires_grad_()
        loss, _ = ours(b, normalisation, 0.1, 1.5, logprobs=logprobs)
        loss.backward()
        assert loss.item() == 0 and logprobs.grad is not None and not logprobs.grad.any()


def test_first_update_is_plain_policy_gradient() -> None:
    # old = logprobs: the ratio is 1, so the gradient is -A / N, wherever the clip stands.
    b = batch(6)
    b["old"] = b["logprobs"]
    logprobs = torch.from_numpy(b["logprobs"].copy()).requires_grad_()
    loss, stats = ours(b, logprobs=logprobs)
    loss.backward()
    want = -b["advantages"][:, None] * b["mask"] / b["mask"].sum()
    assert logprobs.grad is not None
    np.testing.assert_allclose(logprobs.grad, want, rtol=1e-12)
    assert stats["ratio"] == stats["tokens"]
    assert stats["policy_kl"] == stats["clipped_low"] == stats["clipped_high"] == 0


def test_only_logprobs_get_a_gradient() -> None:
    b = batch(7)
    t = {name: torch.from_numpy(b[name].copy()).requires_grad_() for name in ("logprobs", "old", "sampler", "base")}
    loss, _ = ours(
        b, "token", 0.1, 1.5, logprobs=t["logprobs"],
        old_logprobs=t["old"], sampler_logprobs=t["sampler"], base_logprobs=t["base"],
    )  # fmt: skip
    loss.backward()
    assert [name for name, tensor in t.items() if tensor.grad is not None] == ["logprobs"]


def test_kl_terms_average_to_the_kl() -> None:
    rng = np.random.default_rng(8)
    p, q = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
    terms = kl_terms(torch.from_numpy(np.log(p)), torch.from_numpy(np.log(q))).numpy()
    assert (terms >= 0).all()
    assert float(p @ terms) == pytest.approx(float(p @ (np.log(p) - np.log(q))), rel=1e-12)
    assert kl_terms(torch.tensor([-1.5]), torch.tensor([-1.5])).item() == 0


def test_importance_weights_are_cut() -> None:
    old, sampler = torch.tensor([-1.0, -1.0, -0.1, 0.0]), torch.tensor([-1.0, -0.5, -5.0, -500.0])
    np.testing.assert_allclose(importance_weights(old, sampler, 2.0), [1, np.exp(-0.5), 2, 2], rtol=1e-6)


def test_importance_stats() -> None:
    b = batch(9)
    _, stats = ours(b, cap=1.5)
    gap = (b["old"] - b["sampler"])[b["mask"]]
    assert stats["importance_truncated"] == (np.exp(gap) > 1.5).sum() > 0
    assert stats["sampler_gap"] == pytest.approx(np.abs(gap).sum(), rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalisation": "bnpo"}, "one of token, sequence, got 'bnpo'"),
        ({"logprobs": torch.zeros(ROWS, TOKENS, dtype=torch.bfloat16)}, "float32 or float64"),
        ({"advantages": torch.zeros(ROWS, TOKENS)}, "advantages"),
        ({"old_logprobs": torch.zeros(ROWS, 1)}, r"old_logprobs has shape \(6, 1\)"),
        ({"loss_mask": torch.ones(ROWS, TOKENS)}, "loss_mask must be bool"),
        ({"sampler_logprobs": torch.zeros(ROWS, TOKENS)}, "importance_cap above 0, got None"),
        ({"base_logprobs": None, "kl_coef": 0.1}, "kl_coef 0.1 needs base_logprobs"),
        ({"total_tokens": 20}, "holds 21 and 5"),
        ({"total_completions": 4}, "holds 21 and 5"),
    ],
)
def test_misuse_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(batch(), **changes)


def test_group_advantages_are_the_formula() -> None:
    rewards = np.random.default_rng(10).choice([0.0, 0.25, 1.0], size=(5, 8))
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    t = torch.from_numpy(rewards)
    np.testing.assert_allclose(group_advantages(t, "mean"), centred, atol=1e-15)
    want = centred / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(group_advantages(t, "group"), want, rtol=1e-12, atol=1e-15)
    assert not np.allclose(want, centred / (rewards.std(axis=1, keepdims=True) + 1e-4), rtol=1e-2)
    assert group_advantages(t.float(), "group").dtype == torch.float32
    assert group_advantages(torch.tensor([[0, 1]]), "group").dtype == torch.float32
    # two completions, one right: (1 - 1/2) / (sqrt(1/2) + 1e-4)
    np.testing.assert_allclose(
        group_advantages(torch.tensor([[1.0, 0.0]]), "group")[0], [0.7070068, -0.7070068], atol=1e-6
    )


def test_equal_rewards_carry_exactly_nothing() -> None:
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.1, 0.2], [1.0, 1.0, 1.0], [0.0, 1e-6, 0.0]], dtype=torch.float64)
    assert rewards[0].mean() != 0.1  # the rounding that must not reach the advantages
    assert zero_variance(rewards).tolist() == [True, False, True, False]
    for kind in ("group", "mean"):
        advantages = group_advantages(rewards, kind)
        assert not advantages[[0, 2]].any() and advantages[[1, 3]].all()


def test_bad_rewards_are_refused() -> None:
    with pytest.raises(UserError, match="group_size must be at least 2, got 1"):
        group_advantages(torch.zeros(3, 1), "group")
    with pytest.raises(UserError, match="one of group, mean, got 'batch'"):
        group_advantages(torch.zeros(3, 2), "batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite"):
        group_advantages(torch.tensor([[0.0, float("nan")]]), "group")
    with pytest.raises(ValueError, match="shape"):
        zero_variance(torch.zeros(3))
