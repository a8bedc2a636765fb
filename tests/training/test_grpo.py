"""One step on v against Adam and the published loss written out in NumPy, on log-probs with a known gradient."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tinylora.adapter.attach import attach
from tinylora.adapter.config import AdapterConfig
from tinylora.config.run import GrpoConfig, OptimConfig, RunConfig, TrainConfig
from tinylora.errors import UserError
from tinylora.generation.transformers_backend import TransformersEngine
from tinylora.generation.types import Request, SamplingParams
from tinylora.learner.learner import Learner, Row
from tinylora.rollouts.groups import Group
from tinylora.rollouts.replies import Reply
from tinylora.tasks.base import Item
from tinylora.training.grpo import grpo_step
from tinylora.training.update import learning_rate, make_optimizer

START = np.array([[0.3, -0.2]])


def slopes(row: Row) -> np.ndarray:
    """(tokens, 2): the fixed gradient in v of each token's log-prob."""
    return np.array([[np.sin(token), np.cos(2.0 * token)] for token in row.token_ids])


class Linear:
    """A learner whose log-probs are -2 + slopes . v; counts its calls under a vector and under the base model."""

    shared_prompts = True
    padded = False

    def __init__(self) -> None:
        self.calls: list[bool] = []

    def logprobs(self, rows: Sequence[Row], v: Tensor | None) -> tuple[Tensor, Tensor]:
        self.calls.append(v is not None)
        value = torch.zeros(1, 2) if v is None else v
        width = max(len(row.token_ids) for row in rows)
        out, mask = [], torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            mask[i, : len(row.token_ids)] = True
            scores = -2 + torch.from_numpy(slopes(row)).float() @ value[0]
            out.append(torch.nn.functional.pad(scores, (0, width - len(row.token_ids))))
        return torch.stack(out), mask


def numpy_logprobs(row: Row, v: np.ndarray) -> np.ndarray:
    return -2 + slopes(row) @ v[0]


def group(rewards: list[float], tokens: list[tuple[int, ...]], stopped: Sequence[bool] = (), gap: float = 0.0) -> Group:
    """Completions sampled at START, up to `gap`."""
    prompt = (5, 6, 7)
    ended = list(stopped) or [True] * len(tokens)
    replies = []
    for i, ids in enumerate(tokens):
        logprobs = tuple(float(x) for x in numpy_logprobs(Row(0, prompt, ids), START) + gap)
        replies.append(Reply("0", "q", "a", "t", 0.0, 0.0, ended[i], len(ids), {}, token_ids=ids, logprobs=logprobs))
    return Group(Item("0", "q", "a"), prompt, replies, rewards)


GROUPS = [
    group([1.0, 0.0, 0.0], [(11, 12, 13), (14,), (15, 16)]),
    group([0.0, 2.0, 1.0], [(21, 22), (23, 24, 25, 26), (27,)]),
]


def config(*, lr: float = 0.05, tokens: int = 4096, optim: dict[str, Any] | None = None, **grpo: Any) -> RunConfig:
    grpo = {"max_logprob_gap": 5.0} | grpo
    return RunConfig(
        grpo=GrpoConfig(**grpo),
        optim=OptimConfig(lr=lr, **(optim or {})),
        train=TrainConfig(micro_batch_tokens=tokens),
    )


def run(groups: list[Group], settings: RunConfig, step: int = 0) -> tuple[np.ndarray, dict[str, float], Linear]:
    v = torch.tensor(START, dtype=torch.float32, requires_grad=True)
    learner = Linear()
    metrics = grpo_step(learner, groups, v, make_optimizer(v, settings), settings, step)  # type: ignore[arg-type]
    return v.detach().double().numpy(), metrics, learner


def numpy_step(groups: list[Group], settings: RunConfig, updates: int = 1) -> tuple[np.ndarray, list[np.ndarray]]:
    """v after the updates, and their gradients: loss by finite differences, Adam as in Kingma and Ba, algorithm 1."""
    grpo, optim = settings.grpo, settings.optim
    rows, advantages, old, sampler, trained = [], [], [], [], []
    for number, one in enumerate(groups):
        r = np.array(one.rewards)
        for i, c in enumerate(one.replies):
            rows.append(Row(number, one.prompt_ids, c.token_ids))
            advantages.append((r[i] - r.mean()) / (r.std(ddof=1) + 1e-4) if r.max() > r.min() else 0.0)
            old.append(numpy_logprobs(rows[-1], START))
            sampler.append(np.array(c.logprobs))
            trained.append(c.stopped or grpo.truncated != "mask")
    total = sum(len(row.token_ids) for row, t in zip(rows, trained, strict=True) if t)

    def loss(v: np.ndarray) -> float:
        whole = 0.0
        for row, a, o, s, t in zip(rows, advantages, old, sampler, trained, strict=True):
            if not t:
                continue
            now = numpy_logprobs(row, v)
            ratio = np.exp(now - o)
            weight = np.minimum(np.exp(o - s), grpo.importance_cap)
            terms = -weight * np.minimum(ratio * a, np.clip(ratio, 1 - grpo.clip_low, 1 + grpo.clip_high) * a)
            away = -2 - now
            terms = terms + grpo.kl_coef * (np.exp(away) - away - 1)
            whole += terms.sum() / total if grpo.normalisation == "token" else terms.mean() / len(rows)
        return whole

    v, m, u = START.copy(), np.zeros((1, 2)), np.zeros((1, 2))
    gradients = []
    for t in range(1, updates + 1):
        g = np.zeros((1, 2))
        for i in range(2):
            h = np.zeros((1, 2))
            h[0, i] = 1e-6
            g[0, i] = (loss(v + h) - loss(v - h)) / 2e-6
        gradients.append(g)
        m = optim.beta1 * m + (1 - optim.beta1) * g
        u = optim.beta2 * u + (1 - optim.beta2) * g**2
        v = v - optim.lr * (m / (1 - optim.beta1**t)) / (np.sqrt(u / (1 - optim.beta2**t)) + optim.eps)
    return v, gradients


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalisation": "sequence"},
        {"kl_coef": 0.3},
        {"updates_per_batch": 2},
        {"updates_per_batch": 3, "kl_coef": 0.1, "clip_high": 0.01, "clip_low": 0.01},
    ],
)
@pytest.mark.parametrize("tokens", [4096, 9])
def test_a_step_is_adam_on_the_published_loss(changes: dict[str, Any], tokens: int) -> None:
    """eps = 1 makes the step follow the gradient's size, which plain Adam's first step hardly does."""
    settings = config(lr=1.0, tokens=tokens, optim={"eps": 1.0}, **changes)
    v, metrics, _ = run(GROUPS, settings)
    expected, gradients = numpy_step(GROUPS, settings, settings.grpo.updates_per_batch)
    np.testing.assert_allclose(v, expected, atol=2e-6)
    assert metrics["grad_norm"] == pytest.approx(float(np.linalg.norm(gradients[-1])), rel=1e-4)
    assert not np.allclose(v, START, atol=1e-3)


def test_updates_on_the_same_batch_use_the_first_ones_log_probs() -> None:
    """The second update's ratio is not 1: two calls of one update each go elsewhere."""
    settings = config(lr=1.0, optim={"eps": 1.0}, updates_per_batch=2)
    v, metrics, learner = run(GROUPS, settings)
    assert metrics["policy_kl"] > 1e-6
    assert learner.calls == [True, True]
    once, _, _ = run(GROUPS, config(lr=1.0, optim={"eps": 1.0}))
    assert not np.allclose(v, once, atol=1e-4)


def test_the_kl_is_to_v_0_and_computed_once() -> None:
    settings = config(kl_coef=0.5, updates_per_batch=2)
    _, metrics, learner = run(GROUPS, settings)
    assert learner.calls == [True, False, True]
    one, _, _ = run([group([1.0, 1.0], [(11, 12), (13,)])], config(kl_coef=0.5, lr=1.0, optim={"eps": 1.0}))
    expected, _ = numpy_step([group([1.0, 1.0], [(11, 12), (13,)])], config(kl_coef=0.5, lr=1.0, optim={"eps": 1.0}))
    np.testing.assert_allclose(one, expected, atol=1e-6)  # equal rewards: only the KL moves v
    assert not np.allclose(one, START, atol=1e-4)
    assert metrics["base_kl"] > 0


def test_importance_weights_correct_for_the_sampler() -> None:
    off = [group([1.0, 0.0], [(11, 12), (13,)], gap=-0.3), group([0.0, 1.0], [(21,), (22, 23)], gap=-3.0)]
    settings = config(lr=1.0, optim={"eps": 1.0}, importance_cap=1.5)
    v, metrics, _ = run(off, settings)
    np.testing.assert_allclose(v, numpy_step(off, settings)[0], atol=2e-6)
    assert metrics["sampler_gap"] == pytest.approx((3 * 0.3 + 3 * 3.0) / 6, rel=1e-5)
    assert metrics["importance_truncated"] == pytest.approx(0.5)


def test_truncated_completions_are_masked_or_kept() -> None:
    cut = [group([1.0, 0.0, 0.5], [(11, 12, 13), (14,), (15, 16)], stopped=[True, True, False]), GROUPS[1]]
    for truncated, tokens in (("mask", 11), ("keep", 13), ("zero", 13)):
        settings = config(lr=1.0, optim={"eps": 1.0}, truncated=truncated)
        v, metrics, _ = run(cut, settings)
        np.testing.assert_allclose(v, numpy_step(cut, settings)[0], atol=2e-6)
        assert metrics["tokens_trained"] == tokens


def test_groups_of_equal_rewards_count_but_do_not_train() -> None:
    flat = group([1.0, 1.0], [(31, 32, 33), (34, 35)])
    v, metrics, learner = run([flat], config())
    np.testing.assert_array_equal(v, START.astype(np.float32))
    assert learner.calls == []
    assert metrics == {"policy_loss": 0.0, "grad_norm": 0.0, "tokens_trained": 5.0, "tokens_computed": 0.0}
    settings = config(lr=1.0, optim={"eps": 1.0})
    v, metrics, _ = run([group([1.0, 0.0], [(11, 12), (13,)]), flat], settings)
    np.testing.assert_allclose(v, numpy_step([group([1.0, 0.0], [(11, 12), (13,)]), flat], settings)[0], atol=2e-6)
    assert (metrics["tokens_trained"], metrics["tokens_computed"]) == (8.0, 3.0)


def test_momentum_alone_does_not_move_v() -> None:
    settings = config()
    v = torch.tensor(START, dtype=torch.float32, requires_grad=True)
    optimizer = make_optimizer(v, settings)
    grpo_step(Linear(), GROUPS, v, optimizer, settings, 0)  # type: ignore[arg-type]
    before = v.detach().clone()
    grpo_step(Linear(), [group([1.0, 1.0], [(31,), (32,)])], v, optimizer, settings, 1)  # type: ignore[arg-type]
    assert torch.equal(v.detach(), before)


def test_the_gradient_norm_is_clipped_and_reported_unclipped() -> None:
    free, clipped = ({"optim": {"eps": 1.0, "max_grad_norm": norm}, "lr": 1.0} for norm in (0.0, 1e-3))
    _, gradients = numpy_step(GROUPS, config(**free))
    g = gradients[0] / np.linalg.norm(gradients[0]) * 1e-3
    v, metrics, _ = run(GROUPS, config(**clipped))
    np.testing.assert_allclose(v, START - g / (np.abs(g) + 1), atol=1e-6)
    assert metrics["grad_norm"] == pytest.approx(float(np.linalg.norm(gradients[0])), rel=1e-4)


def test_the_rate_rises_over_the_warm_up() -> None:
    settings = config(lr=0.4, optim={"warmup_steps": 4})
    assert [learning_rate(settings, step) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert learning_rate(config(lr=0.4), 0) == 0.4
    slow, _, _ = run(GROUPS, settings, step=0)
    full, _, _ = run(GROUPS, settings, step=9)
    np.testing.assert_allclose(4 * (slow - START), full - START, atol=1e-6)


@pytest.mark.parametrize("gap", [float("nan"), -float("inf")])
def test_a_loss_that_is_not_finite_leaves_v_as_it_was(gap: float) -> None:
    broken = replace(GROUPS[0], replies=group([1, 0, 0], [(11, 12, 13), (14,), (15, 16)], gap=gap).replies)
    v = torch.tensor(START, dtype=torch.float32, requires_grad=True)
    optimizer = make_optimizer(v, config())
    with pytest.raises(UserError, match=r"step 4: .* v is kept as it was"):
        grpo_step(Linear(), [GROUPS[1], broken], v, optimizer, config(), 3)  # type: ignore[arg-type]
    assert torch.equal(v.detach(), torch.tensor(START, dtype=torch.float32))
    assert not optimizer.state


def test_a_sampler_far_from_the_learner_stops_the_run() -> None:
    far = [group([1.0, 0.0], [(11, 12), (13,)], gap=0.25)]
    v = torch.tensor(START, dtype=torch.float32, requires_grad=True)
    settings = config(max_logprob_gap=0.2)
    message = r"step 1: .* differ by 0\.250 on average, more than grpo\.max_logprob_gap = 0\.2"
    with pytest.raises(UserError, match=message):
        grpo_step(Linear(), far, v, make_optimizer(v, settings), settings, 0)  # type: ignore[arg-type]
    assert torch.equal(v.detach(), torch.tensor(START, dtype=torch.float32))
    run(far, config(max_logprob_gap=0.3))


def test_a_step_raises_what_was_rewarded_on_a_real_model(tiny_llama: PreTrainedModel) -> None:
    """Engine, learner and step together: the rewarded completion becomes more likely, and the ratio starts at 1."""
    adapter = attach(tiny_llama, AdapterConfig(u=2, n_tie=8))
    engine = TransformersEngine(tiny_llama, context_length=128, adapter=adapter)
    learner = Learner(tiny_llama, adapter)
    v = adapter.zeros().requires_grad_(True)
    settings = config(lr=0.01, max_logprob_gap=0.1)
    prompt = (40, 41, 42)
    request = Request(prompt_ids=prompt, params=SamplingParams(max_new_tokens=5), num_samples=3, v=v.detach().clone())
    found = engine.generate([request])
    replies = [
        Reply("0", "q", "a", "t", 0.0, 0.0, True, 5, {}, token_ids=c.token_ids, logprobs=c.logprobs) for c in found
    ]
    one = Group(Item("0", "q", "a"), prompt, replies, [1.0, 0.0, 0.0])

    def likelihoods(vector: Tensor) -> Tensor:
        with torch.no_grad():
            return learner.logprobs([Row(0, prompt, c.token_ids) for c in found], vector)[0].sum(1)

    before = likelihoods(v)
    metrics = grpo_step(learner, [one], v, make_optimizer(v, settings), settings, 0)
    change = likelihoods(v) - before
    assert metrics["ratio"] == pytest.approx(1, abs=1e-6)
    assert metrics["sampler_gap"] < 1e-5
    assert float(change[0]) > float(change[1:].mean())
