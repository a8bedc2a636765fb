"""Each completion's own gradient against one float64 backward pass a completion through a plain model."""

from typing import Any

import pytest
import torch
from packed_models import ARCHITECTURES, PROMPTS, adapted, batch, build, plain
from torch import Tensor
from transformers import PreTrainedModel

from tinylora.adapter.attach import AttachedAdapter, attach
from tinylora.adapter.config import AdapterConfig
from tinylora.errors import UserError
from tinylora.learner import packed
from tinylora.learner.learner import Learner, Row
from tinylora.learner.scores import cheaper_way, cost, reply_scores, score_batches


def rows_of(kind: str) -> list[Row]:
    prompts, completions = batch(kind)
    distinct = list(dict.fromkeys(prompts))
    return [Row(distinct.index(p), p, c) for p, c in zip(prompts, completions, strict=True)]


def expected(name: str, adapter: AttachedAdapter, v: Tensor, rows: list[Row], T: float) -> tuple[list[Tensor], Tensor]:
    found = plain(name, adapter, v, [r.prompt_ids for r in rows], [r.token_ids for r in rows], T)
    return found, torch.stack([torch.autograd.grad(one.sum(), v, retain_graph=True)[0] for one in found]).double()


@pytest.mark.parametrize("way", ["apart", "tangents"])
@pytest.mark.parametrize("kind", list(PROMPTS))
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_scores_are_those_of_one_backward_a_reply(
    name: str, kind: str, way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    adapter, v = adapted(model)
    rows = rows_of(kind)
    logprobs, scores = expected(name, adapter, v, rows, 0.7)
    learner = Learner(model, adapter, temperature=0.7)
    for small in (False, True):  # small: blocks of a few queries, so that a row is cut into spans
        if small:
            monkeypatch.setattr(packed, "BLOCK_SCORES", 4 * 40)
            monkeypatch.setattr(packed, "_SMALL_BLOCK", 0)
            monkeypatch.setattr(packed, "_MIN_SPAN", 2)
        got = reply_scores(learner, rows, v, way)
        for one, other in zip(got.logprobs, logprobs, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
        most = float(scores.abs().max())
        torch.testing.assert_close(got.scores.double(), scores, rtol=1e-5, atol=1e-5 * most)


@pytest.mark.parametrize("way", ["apart", "tangents"])
def test_one_token_replies_and_adapters_on_some_maps(way: Any) -> None:
    adapter, v = adapted(model := build("qwen2"), targets=["v_proj", "down_proj"])
    rows = [Row(0, (5, 6, 7), (9,)), Row(0, (5, 6, 7), (8,)), Row(1, (4,), (3,))]
    _, scores = expected("qwen2", adapter, v, rows, 1.0)
    got = reply_scores(Learner(model, adapter), rows, v, way)
    torch.testing.assert_close(got.scores.double(), scores, rtol=1e-5, atol=1e-5 * float(scores.abs().max()))


def test_finite_differences_agree() -> None:
    adapter, v = adapted(model := build("llama"))
    rows, learner = rows_of("common"), Learner(model, adapter)
    got = reply_scores(learner, rows, v).scores.double()
    step = 1e-3
    for group, number in [(0, 0), (1, 1)]:
        moved = []
        for sign in (1, -1):
            other = v.detach().clone()
            other[group, number] += sign * step
            moved.append(learner.logprobs(rows, other)[0].double().sum(1))
        slope = (moved[0] - moved[1]) / (2 * step)
        # float32 log-probs of some 30 nats a reply: differences are known to about 1e-5 / step
        torch.testing.assert_close(got[:, group, number], slope, rtol=2e-2, atol=2e-2 * float(slope.abs().max()))


def test_their_sum_is_the_gradient_of_the_sum_and_batches_do_not_move_them() -> None:
    adapter, v = adapted(model := build("mistral"))
    rows, learner = rows_of("common"), Learner(model, adapter, temperature=0.9)
    (whole,) = torch.autograd.grad(learner.logprobs(rows, v)[0].sum(), v)
    for max_tokens in (1, 60, 10_000):
        scores = torch.zeros(len(rows), *v.shape)
        seen: list[int] = []
        for part in score_batches(rows, v.numel(), max_tokens):
            scores[part] = reply_scores(learner, [rows[i] for i in part], v).scores
            seen += part
        assert sorted(seen) == list(range(len(rows)))
        torch.testing.assert_close(scores.sum(0), whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


def test_checkpointing_moves_nothing() -> None:
    adapter, v = adapted(model := build("gemma3"))
    rows = rows_of("common")
    for way in ("apart", "tangents"):
        kept = reply_scores(Learner(model, adapter), rows, v, way)
        again = reply_scores(Learner(model, adapter, checkpointing=True), rows, v, way)
        torch.testing.assert_close(again.scores, kept.scores, rtol=1e-6, atol=1e-6)


def test_a_model_that_is_not_packed_has_scores_too(tiny_gpt2: PreTrainedModel) -> None:
    adapter = attach(tiny_gpt2, AdapterConfig(u=3, n_tie=100))
    v = 0.2 * torch.randn(adapter.zeros().shape, generator=torch.Generator().manual_seed(2))
    learner, rows = Learner(tiny_gpt2, adapter), rows_of("apart")
    assert learner.packed is None
    got = reply_scores(learner, rows, v)
    for row, score in zip(rows, got.scores, strict=True):
        one = v.clone().requires_grad_(True)
        (alone,) = torch.autograd.grad(learner.logprobs([row], one)[0].sum(), one)
        torch.testing.assert_close(score, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def test_bfloat16_scores_are_near_those_of_float32() -> None:
    model = build("llama")
    adapter, v = adapted(model)
    rows = rows_of("common")
    exact = reply_scores(Learner(model, adapter), rows, v).scores
    narrow, v = adapted(build("llama").to(torch.bfloat16))
    scale = float(exact.norm())
    for way in ("apart", "tangents"):
        got = reply_scores(Learner(narrow.model, narrow), rows, v, way).scores
        assert float((got - exact).norm()) < 0.1 * scale


def test_the_way_of_fewer_tokens_is_taken() -> None:
    many = [Row(0, tuple(range(1, 101)), (5, 6)) for _ in range(16)]
    one = [Row(0, tuple(range(1, 101)), (5, 6))]
    assert cost(many, 13, "tangents") == 14 * 100 + 3 * 32 and cost(many, 13, "apart") == 3 * (1600 + 32)
    assert cheaper_way(many, 13, True) == "tangents" and cheaper_way(one, 13, True) == "apart"
    assert cheaper_way(many, 13, False) == "apart"


def test_a_score_that_is_not_finite_is_refused() -> None:
    adapter, v = adapted(model := build("llama"))
    with torch.no_grad():
        next(iter(adapter.layers.values())).B.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        reply_scores(Learner(model, adapter), rows_of("apart"), v)
