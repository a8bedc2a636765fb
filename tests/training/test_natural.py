"""npg's mathematics: by hand, by NumPy and by simulation; nothing here shares code with natural.py."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinylora.training import natural
from tinylora.training.natural import Curvature

Array = NDArray[np.float64]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reparameterisation(d: int) -> Tensor:
    """v = B w with scales from 1 to 1000 and a rotation on both sides."""
    turn, other = (torch.linalg.qr(normal(d, d, seed=seed))[0] for seed in (1, 2))
    return turn @ torch.diag(torch.logspace(0, 3, d, dtype=torch.float64)) @ other


def test_the_curvature_is_a_running_mean_that_counts_replies() -> None:
    batches = [normal(n, 3, seed=n) for n in (4, 10, 6)]
    curvature = Curvature(3, decay=0.5)
    for batch in batches:
        curvature.update(batch)
    weights = np.concatenate([np.full(4, 0.25), np.full(10, 0.5), np.full(6, 1.0)])
    rows = np.concatenate([batch.numpy() for batch in batches])
    expected = (rows * weights[:, None]).T @ rows / weights.sum()
    np.testing.assert_allclose(curvature.products / curvature.weight, expected, rtol=1e-12)
    assert curvature.replies == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-12)


def test_with_many_replies_nothing_is_shrunk_and_with_few_it_is_nearer_to_the_truth() -> None:
    truth = np.diag(np.logspace(-2, 2, 12))
    errors: list[tuple[float, float]] = []
    for seed in range(30):
        scores = normal(16, 12, seed=seed) * torch.from_numpy(np.sqrt(truth.diagonal()))
        curvature = Curvature(12, decay=0.0)
        curvature.update(scores)
        raw, shrunk = (scores.T @ scores / 16).numpy(), curvature.matrix().numpy()
        np.testing.assert_allclose(shrunk.diagonal(), raw.diagonal(), rtol=1e-12)
        scale = np.sqrt(np.outer(truth.diagonal(), truth.diagonal()))
        errors.append((np.linalg.norm((raw - truth) / scale), np.linalg.norm((shrunk - truth) / scale)))
    assert np.mean([s for _, s in errors]) < 0.7 * np.mean([r for r, _ in errors])
    many = Curvature(12, decay=0.0)
    many.update(scores := normal(120, 12))
    np.testing.assert_allclose(many.matrix(), (scores.T @ scores / 120).numpy(), rtol=1e-12)


def test_a_step_costs_what_it_may_and_no_other_of_that_cost_gains_more() -> None:
    s, g = normal(200, 5), normal(5, seed=9)
    F = s.T @ s / 200
    dv = natural.along(natural.solve(F, g), F, 0.02)
    assert float(dv @ F @ dv) / 2 == pytest.approx(0.02, rel=1e-12)
    np.testing.assert_allclose(natural.solve(F, g), np.linalg.solve(F.numpy(), g.numpy()), rtol=1e-9)
    for seed in range(200):
        other = natural.along(normal(5, seed=100 + seed), F, 0.02)
        assert float(g @ other) <= float(g @ dv) + 1e-12
    assert not natural.along(torch.zeros(5, dtype=torch.float64), F, 0.02).any()


def test_the_step_is_the_same_in_every_parameterisation() -> None:
    d, n = 7, 140
    scores, advantages = normal(n, d), normal(n, seed=5)
    scores[3] *= 40.0  # one reply that would be the whole step
    B = reparameterisation(d)
    steps = []
    for s in (scores, scores @ B):  # d/dw = B^T d/dv
        curvature = Curvature(d, decay=0.8)
        curvature.update(s)
        F = curvature.matrix()
        cut, share = natural.clipped(s, F)
        assert 0 < share < 0.2
        g = advantages @ cut / n
        dv = natural.along(natural.solve(F, g), F, 0.01)
        steps.append(natural.within_total(torch.zeros_like(dv), dv, F, 0.004))
    np.testing.assert_allclose((B @ steps[1]).numpy(), steps[0].numpy(), rtol=1e-6, atol=1e-9)


def test_a_number_that_moves_nothing_is_named_and_gets_nothing() -> None:
    s = normal(50, 4)
    s[:, 2] = 0.0
    F = s.T @ s / 50
    assert natural.dead_numbers(F) == [2]
    found = natural.solve(F, torch.ones(4, dtype=torch.float64))
    keep = [0, 1, 3]
    np.testing.assert_allclose(found[keep], np.linalg.solve(F[keep][:, keep].numpy(), np.ones(3)), rtol=1e-9)


def test_two_numbers_that_do_the_same_share_a_step() -> None:
    s = normal(50, 3)
    s[:, 2] = s[:, 1]
    F = s.T @ s / 50
    g = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    found = natural.solve(F, g)
    assert torch.isfinite(found).all() and float(found[1]) == pytest.approx(float(found[2]), rel=1e-6)


def test_the_budget_of_a_run_is_kept() -> None:
    s = normal(100, 3)
    F = s.T @ s / 100
    kl = lambda x: float(x @ F @ x) / 2  # noqa: E731
    v = natural.along(normal(3, seed=1), F, 0.3)
    dv = natural.along(v, F, 0.1)
    assert kl(v + natural.within_total(v, dv, F, 0.4)) == pytest.approx(0.4, rel=1e-9)
    assert torch.equal(natural.within_total(v, -dv, F, 0.4), -dv)
    assert torch.equal(natural.within_total(v, -dv, F, 0.1), -dv)  # outside, on the way back
    assert not natural.within_total(v, dv, F, 0.2).any()
    assert torch.equal(natural.within_total(v, dv, F, 10.0), dv)


def test_leave_one_out() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [0.0, 0.3, 0.6, 0.9]])
    rows = rewards.double().numpy()
    expected = [[r - np.delete(row, i).mean() for i, r in enumerate(row)] for row in rows]
    np.testing.assert_allclose(natural.leave_one_out(rewards), expected, rtol=1e-6, atol=1e-9)
    assert not natural.leave_one_out(rewards)[1].any()


def heavy(generator: np.random.Generator, m: int, size: int, d: int) -> Array:
    """Scores as they are: tails, a level of the prompt's own, lengths that differ."""
    tails = generator.standard_t(3, (m, size, d)) * generator.lognormal(0.0, 0.8, (m, size, 1))
    found: Array = tails + 2.0 * generator.normal(size=(m, 1, d))
    return found


def test_false_alarms_of_the_signal_are_five_in_a_hundred() -> None:
    generator = np.random.default_rng(0)
    trials, alarms, ratios = 800, 0, []
    for trial in range(trials):
        scores = torch.from_numpy(heavy(generator, 6, 8, 13))
        rewards = torch.from_numpy((generator.random((6, 8)) < generator.random((6, 1))).astype(np.float64))
        advantages = natural.leave_one_out(rewards)
        if not bool(advantages.any()):
            continue
        found = natural.signal(advantages, scores, trial)
        alarms += found.p < 0.05
        ratios.append(found.ratio)
    # 5 % of 800 is 40, standard deviation 6.2: outside of 20 to 62 by chance less than once in a thousand
    assert 20 <= alarms <= 62
    assert 0.9 < np.mean(ratios) < 1.1


def test_a_signal_is_seen() -> None:
    generator = np.random.default_rng(1)
    seen = 0
    for trial in range(40):
        scores = torch.from_numpy(heavy(generator, 12, 8, 13))
        own = scores[..., 0] - scores[..., 0].mean(1, keepdim=True)
        logits = 3.0 * own / own.std()
        rewards = torch.from_numpy((generator.random((12, 8)) < torch.sigmoid(logits).numpy()).astype(np.float64))
        seen += natural.signal(natural.leave_one_out(rewards), scores, trial).p < 0.05
    assert seen >= 20


def test_orders_in_parts_say_the_same_up_to_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    advantages, scores = natural.leave_one_out(normal(6, 8, seed=1)), normal(6, 8, 5, seed=2)
    whole = natural.signal(advantages, scores, 0)
    monkeypatch.setattr(natural, "PERMUTED_AT_ONCE", 48 * 100)
    parts = natural.signal(advantages, scores, 0)
    assert parts.ratio == whole.ratio
    assert abs(parts.p - whole.p) < 0.1  # two shares of 999: 4.5 standard deviations, and seeds are fixed


def test_equal_rewards_are_noise() -> None:
    advantages = natural.leave_one_out(torch.ones(3, 4))
    assert natural.signal(advantages, normal(3, 4, 5), 0) == natural.Signal(1.0, 0.0)


def test_the_curvature_is_that_of_the_kl_of_a_policy_that_can_be_summed() -> None:
    # softmax over 6 replies with logits x.v: scores, F and KL by hand
    x, v = normal(6, 3).numpy(), normal(3, seed=4).numpy()

    def policy(v: Array) -> Array:
        p = np.exp(x @ v - (x @ v).max())
        return p / p.sum()

    p = policy(v)
    scores = x - p @ x
    F = torch.from_numpy((scores * p[:, None]).T @ scores)
    for seed, kl in ((0, 1e-2), (1, 1e-4), (2, 1e-6)):
        dv = natural.along(normal(3, seed=seed), F, kl).numpy()
        q = policy(v + dv)
        assert float((p * np.log(p / q)).sum()) == pytest.approx(kl, rel=3 * kl**0.5)


def test_steps_climb_a_bandit_whatever_its_parameterisation() -> None:
    x, right = normal(8, 4).numpy(), 5
    for B in (np.eye(4), reparameterisation(4).numpy()):
        generator, v = np.random.default_rng(0), np.zeros(4)
        curvature = Curvature(4, 0.5)
        for _ in range(60):
            p = np.exp(x @ B @ v - (x @ B @ v).max())
            p /= p.sum()
            drawn = generator.choice(8, (4, 16), p=p)
            scores = torch.from_numpy((x - p @ x) @ B)[torch.from_numpy(drawn)]
            advantages = natural.leave_one_out(torch.from_numpy((drawn == right).astype(np.float64)))
            curvature.update(scores.flatten(0, 1))
            F = curvature.matrix()
            g = torch.einsum("mg,mgd->d", advantages, scores) / drawn.size
            v = v + natural.along(natural.solve(F, g), F, 0.02).numpy()
        assert p[right] > 0.8  # 0.12 at first, or less


def test_a_checkpoint_gives_the_curvature_back() -> None:
    one, other = Curvature(3, 0.8), Curvature(3, 0.8)
    one.update(normal(5, 3))
    other.restore(one.state())
    for curvature in (one, other):
        curvature.update(normal(6, 3, seed=2))
    assert torch.equal(one.matrix(), other.matrix()) and one.replies == other.replies
