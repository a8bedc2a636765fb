"""Adapters on whole models: exact at v = 0, the published update otherwise, and off again without a trace."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tinylora.adapter.attach import AttachedAdapter, attach, linear_maps, output_head_path
from tinylora.adapter.config import AdapterConfig
from tinylora.adapter.projection import projection
from tinylora.errors import UserError

CONFIG = AdapterConfig(u=2, n_tie=3)
IDS = torch.tensor([[5, 9, 77, 130, 4, 200], [8, 8, 254, 3, 60, 11]])
MODELS = ["tiny_llama", "tiny_qwen2", "tiny_gpt2"]


@pytest.fixture
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.getfixturevalue(request.param)


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids).logits


def vector(adapter: AttachedAdapter, seed: int = 0, scale: float = 0.1) -> torch.Tensor:
    shape = (adapter.num_groups, adapter.config.u)
    return torch.from_numpy(np.random.default_rng(seed).normal(scale=scale, size=shape)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_a_zero_vector_changes_no_bit_and_has_a_gradient(model: PreTrainedModel, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits(model)
    adapter = attach(model, CONFIG)
    assert torch.equal(logits(model), before)
    v = adapter.read().requires_grad_()
    adapter.write(v)
    after = logits(model)
    assert torch.equal(after, before)
    after.float().log_softmax(-1)[..., 7].sum().backward()
    assert v.grad is not None
    assert v.grad.dtype == torch.float32
    assert v.grad.abs().min() > 0
    adapter.detach()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def keep_norms_in_float64(model: nn.Module) -> None:
    """The RMS norms of transformers compute in float32 whatever the model's dtype: too coarse for differences."""

    def hook(module: nn.Module, inputs: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
        (x,) = inputs
        return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.register_forward_hook(hook)


@pytest.mark.parametrize("model", MODELS, indirect=True)
@pytest.mark.parametrize("scale", [0.0, 0.05])
def test_gradient_agrees_with_finite_differences_in_float64(model: PreTrainedModel, scale: float) -> None:
    model = model.double()
    keep_norms_in_float64(model)
    adapter = attach(model, CONFIG)

    def loss(v: torch.Tensor) -> torch.Tensor:
        adapter.write(v)
        return -logits(model).log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None]).mean()

    v = vector(adapter, scale=scale or 1.0).double() * (scale > 0)
    v.requires_grad_()
    loss(v).backward()
    assert v.grad is not None
    h = 1e-5
    with torch.no_grad():
        for group in range(adapter.num_groups):
            for i in range(CONFIG.u):
                step = torch.zeros_like(v)
                step[group, i] = h
                slope = float((loss(v + step) - loss(v - step)) / (2 * h))
                assert slope == pytest.approx(float(v.grad[group, i]), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_update_is_the_published_one_with_an_independent_svd(model: PreTrainedModel) -> None:
    maps = {path: module.weight.detach().clone() for path, module in linear_maps(model).items()}
    adapter = attach(model, CONFIG)
    v = vector(adapter)
    adapter.write(v)
    for path, group in zip(adapter.paths, adapter.groups, strict=True):
        W = maps[path].bfloat16().double().numpy()
        W = W.T if isinstance(adapter.layers[path].base, Conv1D) else W
        U, S, Vh = np.linalg.svd(W, full_matrices=False)
        U, S, V = U[:, :2], S[:2], Vh[:2].T
        signs = np.sign((V * adapter.factors[path].V.numpy()).sum(0))  # an SVD leaves the sign of each pair open
        U, V = U * signs, V * signs
        P = projection(0, path, 2, 2)
        expected = np.einsum("ok,k,i,ikl,nl->on", U, S, v[group].double().numpy(), P, V)
        np.testing.assert_allclose(adapter.delta(path).numpy(), expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_one_vector_a_row_equals_a_loop_over_rows(model: PreTrainedModel) -> None:
    adapter = attach(model, CONFIG)
    rows = torch.stack([vector(adapter, 1), vector(adapter, 2)])
    with torch.no_grad():
        base = logits(model)
        adapter.write(rows)
        together = logits(model)
        for i in range(2):
            adapter.write(rows[i])
            alone = logits(model, IDS[i : i + 1])[0]
            torch.testing.assert_close(together[i], alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))
            assert (alone - base[i]).abs().max() > 0.1


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_merged_weights_give_the_adapted_output(model: PreTrainedModel) -> None:
    adapter = attach(model, CONFIG)
    adapter.write(vector(adapter))
    with torch.no_grad():
        adapted = logits(model)
        merged = adapter.merged_weights()
        pristine = {path: layer.base.weight.clone() for path, layer in adapter.layers.items()}
        assert set(merged) == set(adapter.paths)
        adapter.detach()
        base = logits(model)
        for path, weight in merged.items():
            module = model.get_submodule(path)
            assert torch.equal(module.weight, pristine[path])
            module.weight.copy_(weight)
        torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-5 * float(adapted.abs().max()))
    assert (adapted - base).abs().max() > 0.02


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_detach_puts_the_very_same_modules_back(model: PreTrainedModel) -> None:
    before = dict(model.named_modules())
    adapter = attach(model, CONFIG)
    assert dict(model.named_modules()).keys() != before.keys()
    assert linear_maps(model).keys() == {path for path, m in before.items() if isinstance(m, (nn.Linear, Conv1D))}
    assert adapter.detach() is model
    after = dict(model.named_modules())
    assert list(after) == list(before)
    assert all(after[path] is before[path] for path in before)
    with pytest.raises(UserError, match="was taken off"):
        adapter.write(None)
    attach(model, CONFIG)  # and it can be put on again


def test_only_v_is_trained_and_the_weights_stay(tiny_llama: PreTrainedModel) -> None:
    adapter = attach(tiny_llama, CONFIG)
    assert not any(parameter.requires_grad for parameter in tiny_llama.parameters())
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    v = adapter.read().requires_grad_()
    adapter.write(v)
    optimiser = torch.optim.Adam([v], lr=0.1)
    first = logits(tiny_llama).logsumexp(-1).mean()
    first.backward()
    optimiser.step()
    with torch.no_grad():
        assert float(logits(tiny_llama).logsumexp(-1).mean()) < float(first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.state_dict().items())


def test_a_bf16_and_a_float32_load_give_the_same_factors(make_llama: Callable[[], PreTrainedModel]) -> None:
    checkpoint = make_llama().bfloat16()
    wide = make_llama().bfloat16().float()
    assert all(torch.equal(a.float(), b) for a, b in zip(checkpoint.parameters(), wide.parameters(), strict=True))
    first, second = attach(checkpoint, CONFIG), attach(wide, CONFIG)
    assert first.paths == second.paths
    for path in first.paths:
        for name in ("U", "S", "V"):
            assert torch.equal(getattr(first.factors[path], name), getattr(second.factors[path], name))
        for name in ("A", "B", "P"):
            assert getattr(first.layers[path], name).dtype == torch.float32
            assert torch.equal(getattr(first.layers[path], name), getattr(second.layers[path], name))


@pytest.fixture
def make_llama(tiny_llama: PreTrainedModel) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        copy = type(tiny_llama)(tiny_llama.config)
        copy.load_state_dict(tiny_llama.state_dict())
        return copy.eval()

    return make


def test_modules_stand_in_canonical_order_without_the_output_head(tiny_llama: PreTrainedModel) -> None:
    adapter = attach(tiny_llama, AdapterConfig(n_tie=7))
    assert len(adapter.paths) == 21
    assert [path.rsplit(".", 1)[-1] for path in adapter.paths[:4]] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert adapter.groups == [0] * 7 + [1] * 7 + [2] * 7
    assert adapter.num_trained == 3
    assert output_head_path(tiny_llama) == "lm_head"
    assert isinstance(tiny_llama.lm_head, nn.Linear)


def test_a_named_output_head_is_adapted(tiny_llama: PreTrainedModel) -> None:
    before = logits(tiny_llama)
    adapter = attach(tiny_llama, AdapterConfig(targets=("lm_head",)))
    assert adapter.paths == ["lm_head"]
    assert output_head_path(tiny_llama) == "lm_head"
    assert torch.equal(logits(tiny_llama), before)


def test_a_map_that_is_called_base_is_found() -> None:
    model = nn.ModuleDict({"base": nn.Linear(4, 4), "part": nn.ModuleDict({"base": nn.Linear(4, 4)})})
    assert list(linear_maps(model)) == ["base", "part.base"]
    adapter = attach(model, AdapterConfig())
    assert adapter.paths == ["base", "part.base"]
    assert list(linear_maps(model)) == ["base", "part.base"]


def test_write_refuses_what_does_not_fit_and_changes_nothing(tiny_llama: PreTrainedModel) -> None:
    adapter = attach(tiny_llama, CONFIG)
    v = vector(adapter)
    adapter.write(v)
    for shape in [(7,), (6, 2), (7, 1), (14,), (2, 6, 2), (1, 1, 7, 2)]:
        with pytest.raises(UserError, match=r"does not fit; allowed: \(7, 2\)"):
            adapter.write(torch.zeros(shape))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="not finite"):
            adapter.write(torch.full((7, 2), bad))
    assert torch.equal(adapter.read(), v)


def test_using_puts_the_vector_back_even_after_an_error(tiny_llama: PreTrainedModel) -> None:
    adapter = attach(tiny_llama, CONFIG)
    v = vector(adapter)
    adapter.write(v)
    with pytest.raises(RuntimeError, match="inside"), adapter.using(None):
        assert not adapter.read().any()
        raise RuntimeError("inside")
    assert torch.equal(adapter.read(), v)


def test_vectors_one_a_row_cannot_be_merged(tiny_llama: PreTrainedModel) -> None:
    adapter = attach(tiny_llama, CONFIG)
    adapter.write(torch.zeros(3, 7, 2))
    with pytest.raises(UserError, match="3 vectors, one per row, have no one update"):
        adapter.merged_weights()


def test_attaching_twice_is_refused(tiny_llama: PreTrainedModel) -> None:
    attach(tiny_llama, CONFIG)
    with pytest.raises(UserError, match=r"already has an adapter; call detach\(\)"):
        attach(tiny_llama, CONFIG)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdapterConfig(rank=17), r"adapter.rank 17 exceeds the smallest dimension of .*k_proj \(16, 32\); at most 16"),
        (AdapterConfig(targets=("c_attn",)), r"\['c_attn'\] match no linear map; this model has 22"),
        (AdapterConfig(num_groups=22), "num_groups 22 exceeds the 21 adapted modules"),
    ],
)
def test_a_config_that_does_not_fit_leaves_the_model_alone(
    tiny_llama: PreTrainedModel, config: AdapterConfig, message: str
) -> None:
    before = dict(tiny_llama.named_modules())
    with pytest.raises(UserError, match=message):
        attach(tiny_llama, config)
    assert dict(tiny_llama.named_modules()) == before
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())


def test_packed_weights_are_refused() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    model["q_proj"].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="q_proj holds packed weights of type torch.uint8; load the model dequantised"):
        attach(model, CONFIG)


def test_a_module_without_a_basis_is_left_out_and_named(tiny_llama: PreTrainedModel) -> None:
    path = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        tiny_llama.get_submodule(path).weight.zero_()
    adapter = attach(tiny_llama, CONFIG)
    assert list(adapter.excluded) == [path]
    assert path not in adapter.paths
    assert len(adapter.paths) == len(adapter.groups) == 20
    only = AdapterConfig(targets=("layers.1.mlp.up_proj",))
    adapter.detach()
    with pytest.raises(UserError, match="every target module was left out"):
        attach(tiny_llama, only)
