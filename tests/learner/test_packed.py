"""The packed forward against transformers' own forwards with merged weights, one unpadded row at a time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packed_models import ARCHITECTURES, HEAD, PROMPTS, adapted, batch, build, plain
from torch import Tensor, nn

from tinylora.errors import UserError
from tinylora.learner import frozen_ops, packed
from tinylora.learner.frozen_ops import FrozenLinear, gated, linears, rms_norm, token_logprobs
from tinylora.learner.layout import Layout, lay_out
from tinylora.learner.memory import activation_bytes, kept_bytes, micro_batch_tokens_for
from tinylora.learner.packed import PackedForward, attention_blocks
from tinylora.models.architecture import describe


def weigh(logprobs: Sequence[Tensor]) -> Tensor:
    flat = torch.cat(list(logprobs))
    return (torch.linspace(-0.5, 1.5, len(flat), dtype=flat.dtype) * flat).sum()


@pytest.mark.parametrize("kind", list(PROMPTS))
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_scores_and_gradient_are_those_of_plain_models(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    adapter, v = adapted(model)
    prompts, completions = batch(kind)
    expected = plain(name, adapter, v, prompts, completions, 0.7)
    (expected_grad,) = torch.autograd.grad(weigh(expected), v)
    forward = PackedForward(describe(model))
    for small in (False, True):  # small: blocks of a few queries, of rows of like length; logits a few rows at a time
        if small:
            monkeypatch.setattr(packed, "BLOCK_SCORES", 4 * 40)
            monkeypatch.setattr(packed, "_SMALL_BLOCK", 0)
            monkeypatch.setattr(packed, "_MIN_SPAN", 2)
            monkeypatch.setattr(frozen_ops, "CHUNK_ROWS", (3, 5))
            monkeypatch.setattr(frozen_ops, "CACHED_ROWS", 2)
        got = forward.logprobs(prompts, completions, v, 0.7)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
        (grad,) = torch.autograd.grad(weigh(got), v)
        torch.testing.assert_close(
            grad.double(), expected_grad.double(), rtol=1e-5, atol=1e-5 * float(expected_grad.abs().max())
        )
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["v_proj"]])
def test_adapters_on_some_maps_only(targets: list[str]) -> None:
    adapter, v = adapted(build("qwen2"), targets=targets)
    prompts, completions = batch("common")
    expected = plain("qwen2", adapter, v, prompts, completions, 1.0)
    got = PackedForward(describe(adapter.model)).logprobs(prompts, completions, v, 1.0)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.cat(got).double(), torch.cat(expected), rtol=1e-5, atol=1e-5)
    (grad,), (expected_grad,) = (torch.autograd.grad(weigh(one), v) for one in (got, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5 * float(expected_grad.abs().max()))


def test_checkpointing_keeps_less_and_moves_nothing() -> None:
    model = build("gemma3")
    _, v = adapted(model)
    prompts, completions = batch("common")
    kept, grads = [], []
    for checkpointing in (False, True):
        seen: dict[int, int] = {}

        def pack(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[tensor.data_ptr()] = tensor.numel()
            return tensor

        forward = PackedForward(describe(model), checkpointing=checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            got = forward.logprobs(prompts, completions, v, 1.0)
        grads.append(torch.autograd.grad(weigh(got), v)[0])
        kept.append(sum(seen.values()))
    assert kept[1] < 0.5 * kept[0]
    assert torch.equal(*grads)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_the_bytes_kept_are_those_reckoned_with(name: str, checkpointing: bool) -> None:
    """Counted by autograd's own hooks, each storage once."""
    model = build(name)
    _, v = adapted(model)
    architecture = describe(model)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}

    def kept(num_completions: int) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        completions = [tuple(range(3, 103))] * num_completions
        forward = PackedForward(architecture, checkpointing=checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            got = forward.logprobs([(5,)] * num_completions, completions, v, 1.0)
            held = sum(seen.values())
            torch.autograd.grad(weigh(got), v)
        return held

    a_token = (kept(6) - kept(2)) / 400
    expected = [kept_bytes(layer, architecture) for layer in architecture.layers]
    residual = 4 * architecture.hidden_size
    want = 2 * residual + (len(expected) * residual if checkpointing else sum(expected))
    tables = len(architecture.ropes) * 2 * 4 * architecture.head_dim  # a large share of so small a model
    assert want / 1.05 < a_token < 1.05 * (want + tables)


def test_a_memory_budget_gives_tokens() -> None:
    architecture = describe(build("llama"))
    few, more = (micro_batch_tokens_for(size * 2**30, architecture, False) for size in (1, 2))
    need = activation_bytes(architecture, False)
    assert need.fixed + few * need.a_token <= 2**30 < need.fixed + (few + 1) * need.a_token
    assert abs((more - few) * need.a_token - 2**30) < need.a_token
    assert micro_batch_tokens_for(2**30, architecture, True) > few
    with pytest.raises(UserError, match=r"a memory budget of 0\.000977 GiB .* needs at least 0\.\d+ GiB"):
        micro_batch_tokens_for(2**20, architecture, False)


def allowed(layout: Layout, window: int) -> np.ndarray:
    """Which token sees which, pair by pair."""
    owner = {t: one for siblings in layout.segments for one in siblings for t in range(one.start, one.stop)}
    chain = {t: [i for a, b in one.ancestors for i in range(a, b)] for t, one in owner.items()}
    see = np.zeros((len(owner), len(owner)), dtype=bool)
    for t, one in owner.items():
        seen = [*chain[t], *range(one.start, t + 1)]
        see[t, seen[-window:] if window else seen] = True
    return see


@pytest.mark.parametrize("window", [0, 4, 300])
@pytest.mark.parametrize("limit", [2**21, 600, 1])
def test_blocks_cover_every_pair_once(window: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "BLOCK_SCORES", limit)
    monkeypatch.setattr(packed, "_SMALL_BLOCK", 40)
    monkeypatch.setattr(packed, "_MIN_SPAN", 2)
    prompts, completions = batch("common")
    layout = lay_out(prompts, completions)
    n = len(layout.token_ids)
    assert n == len(HEAD) + 1 + 4 + 2 + sum(map(len, completions)) - len(completions)
    see = np.zeros((n, n), dtype=int)
    for block in attention_blocks(layout, 4, window, torch.device("cpu")):
        queries = torch.arange(block.start, block.stop) if block.pad is None else block.pad
        own = torch.arange(block.own_start, block.stop) if block.pad is None else block.pad
        shared = [t for a, b in block.ancestors for t in range(a, b)]
        for query, key in zip(queries.view(block.rows, -1), own.view(block.rows, -1), strict=True):
            keys = torch.cat([torch.tensor(shared, dtype=torch.long), key])
            for i, q in enumerate(query.tolist()):
                hidden = torch.zeros(len(keys), dtype=torch.bool)
                hidden[len(keys) - block.hidden.shape[1] :] = block.hidden[i]
                if q < n:
                    see[q, keys[~hidden]] += 1
    np.testing.assert_array_equal(see, allowed(layout, window))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_against_float64(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(700, 8, generator=generator).requires_grad_()
    weight = torch.randn(31, 8, generator=generator)
    targets = torch.randint(0, 31, (700,), generator=generator)
    got = token_logprobs(x, weight, targets, temperature)
    logits = x.double() @ weight.double().T / temperature
    expected = torch.log_softmax(logits, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    g = torch.linspace(-1, 2, 700)
    (grad,), (want,) = torch.autograd.grad(got, x, g), torch.autograd.grad(expected, x, g.double())
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6)


def test_linears_in_bfloat16_round_like_the_adapted_layer() -> None:
    """Gradients of a frozen weight are never formed, and what reaches R and x is as exact as AdaptedLinear's."""
    model = build("llama")
    adapter, _ = adapted(model.to(torch.bfloat16))
    v = (0.5 * torch.randn(adapter.zeros().shape, generator=torch.Generator().manual_seed(1))).requires_grad_(True)
    layer = adapter.layers["model.layers.0.mlp.gate_proj"]
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_(True)
    R = torch.einsum("i,ijk->jk", v[layer.tie_group], layer.P)
    (y,) = linears(x, [FrozenLinear(layer)], [R])
    with adapter.using(v):
        z = layer(x)
    base = nn.functional.linear(x.detach(), layer.base.weight)
    exact = base.double() + x.detach().double() @ (layer.B @ R.detach() @ layer.A).double().T
    assert (y.double() - exact).abs().max() <= 1.01 * (z.double() - exact).abs().max()
    assert (y != z).float().mean() < 0.01  # a tie in rounding, at most
    g = torch.randn(50, 48, generator=torch.Generator().manual_seed(3)).bfloat16()
    for got, want in zip(torch.autograd.grad(y, (x, v), g), torch.autograd.grad(z, (x, v), g), strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2)
    zero = torch.zeros(2, 2)
    assert torch.equal(linears(x, [FrozenLinear(layer)], [zero])[0], base)


def test_norm_and_gate_against_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("llama", "gemma3"):
        norm: Any = build(name).model.norm
        x = torch.randn(9, 32, generator=generator).requires_grad_()
        g = torch.randn(9, 32, generator=generator)
        got, want = rms_norm(x, norm, 1e-6, name == "gemma3"), norm(x)
        assert torch.equal(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, g)[0] for y in (got, want)), rtol=1e-5, atol=1e-5)
    for activation in (nn.SiLU(), transformers.activations.ACT2FN["gelu_pytorch_tanh"]):
        a, b = (torch.randn(9, 16, generator=generator).requires_grad_() for _ in range(2))
        g = torch.randn(9, 16, generator=generator)
        got, want = gated(a, b, activation), activation(a) * b
        assert torch.equal(got, want)
        for one, other in zip(*(torch.autograd.grad(y, (a, b), g) for y in (got, want)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
