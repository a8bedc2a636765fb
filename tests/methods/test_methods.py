"""Other methods behind TinyLoRA's loop, against PEFT's own models and NumPy: scores, gradients, rollouts, files."""

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import peft
import pytest
import torch
from tiny_run import ByteTask, metrics_of, quiet, start, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tinylora.adapter.attach import AttachedAdapter, linear_maps
from tinylora.adapter.config import AdapterConfig
from tinylora.config.method import MethodConfig, MethodName
from tinylora.config.run import ModelConfig, RunConfig
from tinylora.errors import UserError
from tinylora.generation.types import Request, SamplingParams
from tinylora.learner.learner import Learner, Row
from tinylora.methods.build import put_method_on
from tinylora.methods.engine import engine_for
from tinylora.methods.one_vector import MethodAdapter
from tinylora.planning.inspection import format_inspection, inspect_model
from tinylora.rollouts.runtime import open_runtime
from tinylora.store.adapter import open_adapter
from tinylora.training.train import resume

METHODS = [name for name in get_args(MethodName) if name not in ("tinylora", "qlora")]  # qlora: test_quantised.py
PEFT = ["lora", "dora", "vera", "ia3"]
ROWS = [Row(0, (11, 12, 13), (40, 41, 42)), Row(0, (11, 12, 13), (43,)), Row(1, (7, 9), (50, 51, 52, 53))]
IDS = torch.tensor([[11, 12, 13, 40, 41, 42]])


def put_on(model: PreTrainedModel, name: str, rank: int = 3) -> Any:
    return put_method_on(model, MethodConfig(name=name, rank=rank), AdapterConfig(seed=5))  # type: ignore[arg-type]


def some_v(adapter: Any, size: float = 0.1) -> Tensor:
    return size * torch.randn(adapter.shape, generator=torch.Generator().manual_seed(1))


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits[0]


@pytest.mark.parametrize("model_name", ["tiny_llama", "tiny_qwen2", "tiny_gpt2"])
@pytest.mark.parametrize("name", METHODS)
def test_the_untrained_method_is_the_base_and_leaves_it_as_it_was(
    name: str, model_name: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(model_name)
    weights = copy.deepcopy(model.state_dict())
    base = logits_of(model)
    modules = dict(model.named_modules())
    adapter = put_on(model, name)
    with adapter.using(None):
        assert torch.equal(logits_of(model), base)
    with adapter.using(adapter.zeros()):
        # dora divides by the norm that it multiplies with
        torch.testing.assert_close(logits_of(model), base, rtol=0, atol=1e-4 if name == "dora" else 0)
    with adapter.using(some_v(adapter)):
        assert (logits_of(model) - base).abs().max() > 1e-3
    if isinstance(adapter, MethodAdapter) and not adapter.wrapped:
        with adapter.merged(some_v(adapter)):
            assert (logits_of(model) - base).abs().max() > 1e-3
    adapter.detach()
    assert {path: id(module) for path, module in model.named_modules()} == {p: id(m) for p, m in modules.items()}
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", PEFT)
def test_scores_and_gradients_are_those_of_pefts_own_model(name: str, tiny_qwen2: PreTrainedModel) -> None:
    twin = copy.deepcopy(tiny_qwen2)
    adapter = put_on(tiny_qwen2, name)
    v = some_v(adapter).requires_grad_()
    learner = Learner(tiny_qwen2, adapter, temperature=0.7)
    logprobs, mask = learner.logprobs(ROWS, v)
    (weights := torch.linspace(0.5, 1.5, mask.numel()).reshape(mask.shape)).masked_fill_(~mask, 0)
    (logprobs * weights).sum().backward()

    # PEFT alone, with its parameters set by name and its own autograd
    torch.manual_seed(5)
    with warnings.catch_warnings():  # PEFT's, about transformers
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(twin, adapter.peft_model.peft_config["default"])
    values = {f"base_model.model.{key}": tensor for key, tensor in adapter.tensors(v).items()}
    parameters = {key: p for key, p in theirs.named_parameters() if p.requires_grad}
    assert values.keys() == parameters.keys()
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(values[key])
    total = torch.zeros(())
    for index, row in enumerate(ROWS):
        out = theirs(torch.tensor([[*row.prompt_ids, *row.token_ids]]), use_cache=False).logits[0]
        found = torch.log_softmax(out[len(row.prompt_ids) - 1 : -1] / 0.7, dim=-1)
        found = found[torch.arange(len(row.token_ids)), torch.tensor(row.token_ids)]
        torch.testing.assert_close(logprobs[index, : len(row.token_ids)], found, rtol=0, atol=2e-5)
        total = total + (weights[index, : len(row.token_ids)] * found).sum()
    total.backward()
    gradient = torch.cat([parameters[f"base_model.model.{key}"].grad.flatten() for key in adapter.tensors()])
    assert v.grad is not None
    torch.testing.assert_close(v.grad.flatten(), gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_full_fine_tuning_has_the_gradient_of_every_weight(tiny_llama: PreTrainedModel) -> None:
    twin = copy.deepcopy(tiny_llama).requires_grad_(True)
    adapter = put_on(tiny_llama, "full")
    assert adapter.num_trained == sum(p.numel() for p in twin.parameters())
    v = adapter.zeros().requires_grad_()
    logprobs, mask = Learner(tiny_llama, adapter).logprobs(ROWS[:1], v)
    logprobs[mask].sum().backward()
    out = torch.log_softmax(twin(IDS, use_cache=False).logits[0, 2:-1], dim=-1)
    out[torch.arange(3), IDS[0, 3:]].sum().backward()
    expected = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None])
    assert v.grad is not None
    torch.testing.assert_close(v.grad.flatten(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_tied_weights_are_trained_once(tiny_qwen2: PreTrainedModel) -> None:
    adapter = put_on(tiny_qwen2, "full")
    embedding = tiny_qwen2.get_input_embeddings().weight
    assert adapter.num_trained == sum(p.numel() for p in tiny_qwen2.parameters())
    v = adapter.zeros()
    v[0, : embedding.numel()] = 0.5
    with adapter.using(v):
        head = tiny_qwen2.get_output_embeddings()
        torch.testing.assert_close(head.weight, embedding + 0.5)


def test_lora_xs_is_u_s_r_v_by_lapack(tiny_llama: PreTrainedModel) -> None:
    path = "model.layers.1.mlp.up_proj"
    weight = tiny_llama.get_submodule(path).weight.detach().double().numpy()
    adapter = put_on(tiny_llama, "lora-xs", rank=3)
    assert isinstance(adapter, AttachedAdapter)
    assert adapter.shape == (len(adapter.paths), 9)
    v = some_v(adapter)
    R = v[adapter.paths.index(path)].reshape(3, 3).double().numpy()
    # Signs of a pair (u_i, v_i) are ours to choose: R goes between both, so take them from our own factors.
    U, S, Vt = np.linalg.svd(weight)
    signs = np.sign(np.sum(U[:, :3] * adapter.factors[path].U.numpy(), axis=0))
    U3, V3 = U[:, :3] * signs, Vt[:3] * signs[:, None]
    expected = U3 @ np.diag(S[:3]) @ R @ V3
    found = adapter.delta(path, v).numpy()
    # The basis is that of the weight rounded to bfloat16
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_adapter_layers_are_houlsbys(tiny_llama: PreTrainedModel) -> None:
    adapter = put_on(tiny_llama, "adapter", rank=4)
    assert [path.rpartition(".")[2] for path in adapter.paths] == ["o_proj", "down_proj"] * 3
    path = "model.layers.0.mlp.down_proj"
    values = {k.removeprefix(f"{path}."): t.double().numpy() for k, t in adapter.tensors(some_v(adapter)).items()
              if k.startswith(path)}  # fmt: skip
    x = np.random.default_rng(0).normal(size=(5, 48))
    y = x @ adapter.wrapped[1].plain.weight.double().numpy().T
    a = y @ values["down_weight"].T + values["down_bias"]
    from scipy.special import erf

    expected = y + (0.5 * a * (1 + erf(a / np.sqrt(2)))) @ values["up_weight"].T + values["up_bias"]
    with adapter.using(some_v(adapter)), torch.no_grad():
        found = tiny_llama.get_submodule(path)(torch.from_numpy(x).float()).double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_the_engine_runs_the_model_that_is_trained(name: str, dtype: str, tiny_folder: Path, fresh_cache: Path) -> None:
    """Forced tokens under several vectors in one call, in mixed order, scored as the learner scores them."""
    config = tiny_config(tiny_folder, method={"name": name, "rank": 3})
    config = replace(config, model=replace(config.model, dtype=dtype))  # type: ignore[arg-type]
    runtime = open_runtime(config, task=ByteTask(), say=quiet)
    assert runtime.engine.name == "native"
    learner = Learner(runtime.base.model, runtime.adapter, temperature=0.7)
    vectors = [None, some_v(runtime.adapter, 0.3), some_v(runtime.adapter, -0.3), None, some_v(runtime.adapter, 0.3)]
    requests = [
        Request(prompt_ids=row.prompt_ids, forced_ids=row.token_ids, v=v,
                params=SamplingParams(temperature=0.7, max_new_tokens=len(row.token_ids)))
        for v in vectors for row in ROWS
    ]  # fmt: skip
    completions = runtime.engine.generate(requests)
    assert [one.request_index for one in completions] == list(range(len(requests)))
    effects = []
    for place, v in enumerate(vectors):
        with torch.no_grad():
            expected, mask = learner.logprobs(ROWS, v)
            effects.append(expected[mask])
        found = [torch.tensor(one.logprobs) for one in completions[place * len(ROWS) : (place + 1) * len(ROWS)]]
        gap = (torch.cat(found) - expected[mask]).abs()
        assert gap.mean() < (1e-4 if dtype == "float32" else 0.2), f"vector {place}"
    assert (effects[1] - effects[0]).abs().mean() > (0.02 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "adapter"])
def test_the_engine_knows_biases_and_follows_every_vector(name: str, tiny_qwen2: PreTrainedModel) -> None:
    """Against PEFT's own forward pass (adapter: our layers'), one row at a time."""
    with torch.no_grad():
        for path, bias in tiny_qwen2.named_parameters():
            if path.endswith("bias"):
                bias.normal_(0, 0.5, generator=torch.Generator().manual_seed(3))
    adapter = put_on(tiny_qwen2, name)
    config = RunConfig(model=ModelConfig(device="cpu"), method=MethodConfig(name=name))  # type: ignore[arg-type]
    engine = engine_for(tiny_qwen2, adapter, config, context_length=64, pad_token_id=0, say=quiet)
    assert engine.name == "native"
    (ids,) = IDS.tolist()
    for v in (None, some_v(adapter, 0.3), some_v(adapter, -0.2), None, adapter.zeros()):
        request = Request(prompt_ids=tuple(ids[:3]), forced_ids=tuple(ids[3:]), v=v,
                          params=SamplingParams(max_new_tokens=3))  # fmt: skip
        (found,) = engine.generate([request])
        with adapter.using(v):
            expected = logits_of(tiny_qwen2).log_softmax(-1)[torch.arange(2, 5), torch.tensor(ids[3:])]
        np.testing.assert_allclose(found.logprobs, expected.numpy(), atol=2e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_of_any_method_resumes_and_opens(name: str, tiny_folder: Path, tmp_path: Path, fresh_cache: Path) -> None:
    method: dict[str, Any] = {"name": name, "rank": 2}
    whole = start(tiny_folder, tmp_path / "a", method=method, train={"steps": 4, "keep": "last"}, optim={"lr": 0.01})
    half = start(tiny_folder, tmp_path / "b", method=method, train={"steps": 2, "keep": "last"}, optim={"lr": 0.01})
    assert not torch.equal(whole.v, torch.zeros_like(whole.v))
    again = resume(half.run, ["train.steps=4"], task=ByteTask(), say=quiet)
    assert torch.equal(whole.v, again.v)
    ours, theirs = metrics_of(whole.run), metrics_of(half.run)
    # the shorter run validated at its own end
    strip = lambda rows: [{k: x for k, x in r.items() if not k.startswith("validation")} for r in rows]  # noqa: E731
    assert strip(ours) == strip(theirs)
    opened = open_adapter(whole.run)
    assert torch.equal(opened.v, whole.v)
    runtime = open_runtime(opened.settings(), task=ByteTask(), say=quiet, on=opened)
    assert runtime.adapter.shape == tuple(whole.v.shape)
    with pytest.raises(UserError, match="only TinyLoRA's have a short form"):
        opened.to_portable()


@pytest.mark.parametrize("name", PEFT)
def test_peft_reads_the_folder(name: str, tiny_folder: Path, tmp_path: Path, fresh_cache: Path) -> None:
    done = start(tiny_folder, tmp_path, method={"name": name, "rank": 2}, train={"steps": 2}, optim={"lr": 0.05})
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    base = logits_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(model, str(done.run / "peft"))
    opened = open_adapter(done.run)
    runtime = open_runtime(opened.settings(), task=ByteTask(), say=quiet, on=opened)
    with runtime.adapter.using(opened.v):
        ours = logits_of(runtime.base.model)
    torch.testing.assert_close(logits_of(theirs), ours, rtol=0, atol=1e-4)
    assert (ours - base).abs().max() > 1e-3


def test_another_start_is_noticed(tiny_folder: Path, tmp_path: Path, fresh_cache: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    done = start(tiny_folder, tmp_path, method={"name": "lora", "rank": 2}, train={"steps": 1})
    opened = open_adapter(done.run)
    real = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: real(seed + 1))  # as another version's draws would be
    with pytest.raises(UserError, match="its check disagrees"):
        open_runtime(opened.settings(), task=ByteTask(), say=quiet, on=opened)


def test_targets_choose_the_modules(tiny_llama: PreTrainedModel) -> None:
    method = MethodConfig(name="lora", rank=2)
    adapter = put_method_on(tiny_llama, method, AdapterConfig(targets=("q_proj",)))
    assert [path.rpartition(".")[2] for path in adapter.paths] == ["q_proj"] * 3
    adapter.detach()
    with pytest.raises(UserError, match="adapter layers go behind"):
        put_method_on(tiny_llama, MethodConfig(name="adapter"), AdapterConfig(targets=("q_proj",)))


def test_a_rank_too_large_names_the_methods_key(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(UserError, match=r"method\.rank 17 exceeds the smallest dimension"):
        put_on(tiny_llama, "lora-xs", rank=17)


def test_settings_out_of_range_name_what_is_allowed() -> None:
    for wrong in ({"name": "lorra"}, {"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}):
        with pytest.raises(UserError, match=r"method\.(name|rank|alpha) must be"):
            MethodConfig(**wrong)  # type: ignore[arg-type]


def test_without_peft_its_methods_say_what_to_install(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'tinylora\[peft\]'"):
        put_on(tiny_llama, "lora")


def test_ia3_scales_the_input_of_what_ends_an_mlp(tiny_gpt2: PreTrainedModel, tiny_llama: PreTrainedModel) -> None:
    for model, ends in ((tiny_gpt2, "mlp.c_proj"), (tiny_llama, "mlp.down_proj")):
        adapter = put_on(model, "ia3")
        found = {path for path in adapter.paths if model.get_submodule(path).is_feedforward}
        assert found == {path for path in adapter.paths if path.endswith(ends)} and found


def test_conv1d_maps_are_found(tiny_gpt2: PreTrainedModel) -> None:
    assert any(isinstance(module, Conv1D) for module in linear_maps(tiny_gpt2).values())


@pytest.mark.parametrize("model_name", ["tiny_llama", "tiny_qwen2"])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_said_before_is_what_is_trained(name: str, model_name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(model_name)
    config = RunConfig(method=MethodConfig(name=name, rank=3), model=ModelConfig(device="cpu", dtype="float32"))  # type: ignore[arg-type]
    said = inspect_model(model, config, "a test")
    assert said.num_trained == put_on(model, name).num_trained
    assert said.memory.total > said.memory.weights
    assert ("tie groups (" in format_inspection(said, config.adapter)) is False


def test_other_methods_in_words_and_what_they_refuse(
    tiny_folder: Path, tmp_path: Path, fresh_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tinylora.store.arithmetic import difference, mix
    from tinylora.store.describe import describe_text

    how: dict[str, Any] = {"train": {"steps": 1}}
    one, two = (
        open_adapter(start(tiny_folder, tmp_path / name, method={"name": name, "rank": 2}, **how).run)
        for name in ("lora", "vera")
    )
    text = describe_text(one)
    assert "numbers of lora of rank 2" in text and "tie groups" not in text
    assert difference(one, one).distance == 0
    with pytest.raises(UserError, match=r"holds lora of rank 2 and .* vera of rank 2"):
        difference(one, two)
    with pytest.raises(UserError, match="no linear function of its numbers"):
        mix([one, one], [0.5, 0.5])


def test_a_learning_rate_for_few_numbers_is_remarked_on(tiny_folder: Path, tmp_path: Path, fresh_cache: Path) -> None:
    from tinylora.training.train import train

    for rate, name, is_said in ((4e-3, "lora", True), (3e-4, "lora", False), (4e-3, "tinylora", False)):
        said: list[str] = []
        config = tiny_config(tiny_folder, method={"name": name}, optim={"lr": rate}, train={"steps": 1})
        train(config, ByteTask(), out=tmp_path, say=said.append)
        assert any("suits TinyLoRA's few numbers" in text for text in said) is is_said


def test_a_run_of_very_many_numbers_ends_with_its_evaluation(
    tiny_folder: Path, tmp_path: Path, fresh_cache: Path
) -> None:
    """Numbers too many to write down: result.json and the lines at the end do without them."""
    from tinylora.evaluation.verdict import format_result

    done = start(tiny_folder, tmp_path, method={"name": "full"}, optim={"lr": 1e-3}, train={"steps": 1},
                 eval={"num_test": 3, "random_vectors": 1})  # fmt: skip
    assert done.result is not None and done.result["v"] is None
    text = format_result(done.result)
    assert f"the {done.v.numel():,} numbers (norm" in text and "in the adapter's file" in text
