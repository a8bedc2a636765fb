"""Quantised bases: TinyLoRA and LoRA beside frozen maps of bitsandbytes and torchao, on the CPU.

What a map holds is taken from the libraries' own dequantisation, and what is computed of it from float64 NumPy or from
a plain float model with those values.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import ByteTask, metrics_of, quiet, tiny_config
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tinylora.adapter.attach import AttachedAdapter, attach
from tinylora.adapter.basis import model_basis
from tinylora.adapter.config import AdapterConfig
from tinylora.adapter.explicit import load_explicit
from tinylora.adapter.quantised import KINDS, dequantised, quantisation_of, weight_shape
from tinylora.config.method import ON_QUANTISED, MethodConfig
from tinylora.errors import UserError
from tinylora.interop.gguf_lora import write_gguf
from tinylora.interop.lora import write_lora
from tinylora.interop.merged import write_merged
from tinylora.interop.peft_tinylora import write_peft
from tinylora.learner.learner import Learner, Row
from tinylora.methods.build import put_method_on, resolve_quantization
from tinylora.models import quantise
from tinylora.models.architecture import Unsupported, describe
from tinylora.models.base import BaseModel
from tinylora.models.bases import explain_difference, read_name, remember, written_name
from tinylora.models.fingerprint import identify
from tinylora.models.load import load_base_model
from tinylora.training.train import resume, train

LIBRARY = {"bnb": "bitsandbytes", "torchao": "torchao"}
CONFIG = AdapterConfig(u=2, n_tie=4)
UP = "model.layers.1.mlp.up_proj"


def marked(kind: str) -> Any:
    library = LIBRARY[kind.split("-")[0]]
    missing = importlib.util.find_spec(library) is None
    return pytest.param(kind, marks=pytest.mark.skipif(missing, reason=f"{library} is not installed"))


each_kind = pytest.mark.parametrize("kind", [marked(kind) for kind in KINDS])
needs_bnb = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama whose maps have whole groups of 32 weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=1,
                eos_token_id=2, pad_token_id=0,
            )
        )  # fmt: skip
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.15)
                parameter.copy_(parameter.bfloat16())
    path = tmp_path / "tiny"
    model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def loaded(folder: Path, kind: str, dtype: str = "float32") -> BaseModel:
    return load_base_model(str(folder), device="cpu", dtype=dtype, quantization=kind)


def by_the_library(module: Any, kind: str) -> torch.Tensor:
    """The weight as the library itself dequantises it."""
    if kind == "bnb-4bit":
        import bitsandbytes.functional as F

        return F.dequantize_4bit(module.weight.data, module.weight.quant_state)
    if kind == "bnb-8bit":
        import bitsandbytes.functional as F

        scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        return F.int8_vectorwise_dequant(module.weight.data, scales)
    return module.weight.dequantize()


def float_copy(folder: Path, model: Any, kind: str) -> Any:
    """A plain model that holds the dequantised weights."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    for path, module in model.named_modules():
        if path.endswith("_proj"):
            plain.get_submodule(path).weight.data = by_the_library(module, kind).float().clone()
    return plain


def inputs() -> torch.Tensor:
    return torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(1))


def some_v(adapter: AttachedAdapter) -> torch.Tensor:
    return 0.2 * torch.randn(adapter.shape, generator=torch.Generator().manual_seed(2))


# --- what a map holds ---


@each_kind
def test_values_and_shapes_are_those_of_the_library(folder: Path, kind: str) -> None:
    model = loaded(folder, kind).model
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert quantisation_of(model) == kind and quantisation_of(plain) == ""
    for path in (UP, "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"):
        module, original = model.get_submodule(path), plain.get_submodule(path).weight.detach()
        values = dequantised(module)
        assert weight_shape(module) == tuple(values.shape) == tuple(original.shape)
        torch.testing.assert_close(values, by_the_library(module, kind).float(), rtol=1e-6, atol=1e-8)
        error = float((values - original).norm() / original.norm())
        assert (0.03 if "4" in kind else 0.002) < error < (0.15 if "4" in kind else 0.02)
    assert type(model.lm_head) is torch.nn.Linear  # left out


@each_kind
def test_basis_is_that_of_the_dequantised_weight_rounded_to_bfloat16(folder: Path, kind: str) -> None:
    model = loaded(folder, kind).model
    adapter = attach(model, CONFIG)
    weight = by_the_library(adapter.layers[UP].base, kind).float().bfloat16().double().numpy()
    s = np.linalg.svd(weight, compute_uv=False)
    f = adapter.factors[UP]
    np.testing.assert_allclose(f.S.numpy(), s[:2], rtol=1e-6)
    np.testing.assert_allclose(weight @ f.V.double().numpy(), (f.U * f.S).double().numpy(), atol=1e-6)
    rebuilt, _ = model_basis({UP: lambda: torch.from_numpy(weight)}, CONFIG, None)
    assert torch.equal(rebuilt[UP].U, f.U) and torch.equal(rebuilt[UP].V, f.V)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not np.allclose(attach(plain, CONFIG).factors[UP].S.numpy(), s[:2], rtol=1e-5)


# --- forward and backward ---


@each_kind
def test_adapted_forward_is_the_maps_own_output_plus_the_update(folder: Path, kind: str) -> None:
    adapter = attach(loaded(folder, kind).model, CONFIG)
    v = some_v(adapter)
    layer = adapter.layers[UP]
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), adapter.using(v):
        got, base = layer(x).double().numpy(), layer.base(x).double().numpy()
    f = adapter.factors[UP]
    U, S, V = (t.double().numpy() for t in (f.U, f.S, f.V))
    R = np.einsum("i,ijk->jk", v[layer.tie_group].double().numpy(), adapter.projections[UP])
    update = x.double().numpy() @ (U @ np.diag(S) @ R @ V.T).T
    np.testing.assert_allclose(got, base + update, atol=2e-5)
    assert np.abs(update).max() > 0.05
    # What the map itself computes is its dequantised weight, to the library's own precision.
    W = by_the_library(layer.base, kind).double().numpy()
    np.testing.assert_allclose(base, x.double().numpy() @ W.T, atol=2e-5)


@each_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_v_of_zero_is_the_quantised_base_bit_for_bit(folder: Path, kind: str, dtype: str) -> None:
    model = loaded(folder, kind, dtype).model
    with torch.inference_mode():
        before = model(input_ids=inputs()).logits
    adapter = attach(model, CONFIG)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=inputs()).logits, before)
        with adapter.using(some_v(adapter)):
            assert not torch.equal(model(input_ids=inputs()).logits, before)
    with adapter.using(adapter.zeros().requires_grad_()):  # and with the gradient on
        assert torch.equal(model(input_ids=inputs()).logits, before)


def gradient(model: Any, adapter: AttachedAdapter, checkpointing: bool) -> torch.Tensor:
    rows = [Row(i // 2, tuple(inputs()[i // 2, :4].tolist()), tuple(inputs()[1, i:].tolist())) for i in range(4)]
    learner = Learner(model, adapter, checkpointing=checkpointing, pad_token_id=0)
    v = some_v(adapter).requires_grad_()
    logprobs, mask = learner.logprobs(rows, v)
    (torch.linspace(-1, 1, 4).unsqueeze(1) * logprobs)[mask].sum().backward()
    assert v.grad is not None
    return v.grad


@each_kind
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_of_v_is_that_of_a_float_model_with_the_dequantised_weights(
    folder: Path, kind: str, checkpointing: bool
) -> None:
    model = loaded(folder, kind).model
    plain = float_copy(folder, model, kind)
    adapter = attach(model, CONFIG)
    with torch.inference_mode():  # sampling comes first in every step, and must leave the maps as they are
        model(input_ids=inputs())
    expected = gradient(plain, attach(plain, CONFIG), False)
    got = gradient(model, adapter, checkpointing)
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-4)


@needs_bnb
def test_four_bit_weights_are_not_repacked_for_kernels_without_a_backward_pass(folder: Path) -> None:
    """On processors with bfloat16 instructions bitsandbytes repacks frozen weights at the first forward pass in eval
    mode; what those kernels give has no gradient, so that of v lacked everything behind the first map."""
    model = loaded(folder, "bnb-4bit", "bfloat16").model
    before = model.get_submodule(UP).weight.data.clone()
    with torch.inference_mode():
        model(input_ids=inputs())
    module: Any = model.get_submodule(UP)
    assert torch.equal(module.weight.data, before)
    y = module(torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True))
    assert y.requires_grad
    module.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match="packed this model's weights for inference"):
        attach(model, CONFIG)


@needs_bnb
def test_eight_bit_rows_do_not_depend_on_their_neighbours(folder: Path) -> None:
    """In eval mode bitsandbytes rounds the inputs and takes the columns in which any row of the batch is large out of
    that: such a neighbour moved a row by a hundredth."""
    module: Any = loaded(folder, "bnb-8bit").model.get_submodule(UP)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(5))
    alone = module(x[:1])
    x[1, 7] = 50.0
    torch.testing.assert_close(module(x)[:1], alone, rtol=0, atol=1e-5)
    assert not module.training
    as_it_was = type(module).forward(module, x)[:1]
    assert float((as_it_was - alone).abs().max()) > 1e-3


# --- which base it is ---


@each_kind
def test_fingerprint_is_another_one_and_the_same_every_time(folder: Path, kind: str, fresh_cache: Path) -> None:
    plain = load_base_model(str(folder), device="cpu", dtype="float32")
    first, again = loaded(folder, kind), loaded(folder, kind)
    known = identify(first.model)
    assert known.fingerprint == identify(again.model).fingerprint
    assert known.fingerprint.weights != identify(plain.model).fingerprint.weights
    assert known.fingerprint.shape == identify(plain.model).fingerprint.shape  # of the same kind
    assert known.num_weights == identify(plain.model).num_weights
    # The memory of files seen does not mistake one for the other, whichever comes first.
    assert remember(plain).fingerprint == identify(plain.model).fingerprint
    assert remember(first).fingerprint == known.fingerprint == remember(again).fingerprint
    attach(first.model, CONFIG)
    with torch.inference_mode():
        first.model(input_ids=inputs())
    assert identify(first.model).fingerprint == known.fingerprint
    weight: Any = first.model.get_submodule(UP).base.weight  # type: ignore[union-attr]
    numbers = weight.qdata if "torchao" in kind else weight.data
    numbers.view(-1)[3] += 1
    assert identify(first.model).fingerprint != known.fingerprint
    assert "a quantised copy, or a fine-tune" in explain_difference(identify(plain.model).fingerprint, known)


@needs_bnb
def test_scales_count_in_the_fingerprint_of_four_bit_weights(folder: Path) -> None:
    model = loaded(folder, "bnb-4bit").model
    before = identify(model).fingerprint
    model.get_submodule(UP).weight.quant_state.absmax[0] *= 1.1  # type: ignore[union-attr, operator]
    assert identify(model).fingerprint != before


@needs_bnb
def test_bases_of_four_bits_agree_between_dtypes(folder: Path) -> None:
    assert (
        identify(loaded(folder, "bnb-4bit").model).fingerprint
        == identify(loaded(folder, "bnb-4bit", "bfloat16").model).fingerprint
    )


def test_names_say_how_a_base_was_quantised() -> None:
    for name in (("org/model", "", "none"), ("org/model", "abc", "bnb-4bit"), ("/a b/c", "", "torchao-int8")):
        assert read_name(written_name(*name)) == name
    assert read_name("org/model@main") == ("org/model", "main", "none")


# --- runs ---


def run_config(folder: Path, kind: str, **sections: Any) -> Any:
    config = tiny_config(folder, **{"train": {"steps": 4}, **sections})
    return replace(config, model=replace(config.model, quantization=kind))


@each_kind
@pytest.mark.parametrize("method", ["tinylora", "qlora"])
def test_a_run_that_was_resumed_ends_where_a_whole_one_does(
    folder: Path, kind: str, method: str, tmp_path: Path, fresh_cache: Path
) -> None:
    said: list[str] = []
    settings = {"method": {"name": method, "rank": 2}, "optim": {"lr": 0.01}, "eval": {"every": 2}}
    config = run_config(folder, kind, **settings)
    whole = train(config, ByteTask(), out=tmp_path / "whole", say=said.append)
    assert any("native rollout engine does not cover" in one and "quantised" in one for one in said)
    part = train(replace(config, train=replace(config.train, steps=2)), ByteTask(), out=tmp_path / "part", say=quiet)
    ended = resume(part.run, ["train.steps=4"], task=ByteTask(), say=quiet)
    assert torch.equal(ended.v, whole.v) and float(whole.v.norm()) > 0
    assert metrics_of(ended.run) == metrics_of(whole.run)
    assert f'quantization = "{kind}"' in (whole.run / "config.toml").read_text()


@each_kind
def test_the_packed_learner_and_the_native_engine_leave_quantised_models_alone(folder: Path, kind: str) -> None:
    model = loaded(folder, kind).model
    with pytest.raises(Unsupported, match="its weights are quantised"):
        describe(model)
    del model.config.quantization_config
    with pytest.raises(Unsupported, match="its weights are quantised"):
        describe(model)
    assert Learner(model, attach(model, CONFIG)).padded


@each_kind
def test_lora_exports_and_what_writes_weights_refuses(folder: Path, kind: str, tmp_path: Path) -> None:
    adapter = attach(loaded(folder, kind).model, CONFIG)
    adapter.write(some_v(adapter))
    write_lora(tmp_path / "lora", adapter, base_name="x")
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    for write in (
        lambda: write_merged(tmp_path / "merged", adapter),
        lambda: write_peft(tmp_path / "peft", adapter, base_name="x"),
        lambda: write_gguf(tmp_path / "a.gguf", adapter),
    ):
        with pytest.raises(UserError, match=rf"the base is quantised \({kind}\).*--to lora") as error:
            write()
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("tiny", "cache")) == ["lora"]


# --- what is refused ---


@each_kind
def test_methods_that_need_float_weights_are_refused(folder: Path, kind: str) -> None:
    model = loaded(folder, kind).model
    for name in ("full", "dora", "vera", "ia3"):
        with pytest.raises(UserError, match=f"method {name} needs .* take {ON_QUANTISED[0]}, .*or adapter"):
            put_method_on(model, MethodConfig(name=name), CONFIG)  # type: ignore[arg-type]


def test_qlora_demands_a_quantised_base_and_says_what_it_takes(tiny_llama: Any) -> None:
    with pytest.raises(UserError, match="set model.quantization to one of bnb-4bit"):
        put_method_on(tiny_llama, MethodConfig(name="qlora"), AdapterConfig())
    said: list[str] = []
    config = tiny_config("x", method={"name": "qlora"})
    assert resolve_quantization(config, said.append).model.quantization == "bnb-4bit"
    assert said and "bnb-4bit" in said[0]
    chosen = replace(config, model=replace(config.model, quantization="torchao-int8"))
    assert resolve_quantization(chosen, said.append) == chosen and len(said) == 1
    full = replace(tiny_config("x", method={"name": "full"}), model=chosen.model)
    with pytest.raises(UserError, match="method full needs the base's weights in floating point"):
        resolve_quantization(full, said.append)


@pytest.mark.parametrize("kind", KINDS)
def test_a_library_that_is_missing_or_old_is_named_with_its_extra(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = kind.split("-")[0]
    monkeypatch.setattr(quantise.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install 'tinylora\[{extra}\]'") as error:
        loaded(folder, kind)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(quantise.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(quantise, "version", lambda name: "0.9.1")
    with pytest.raises(UserError, match=rf"or newer, and 0.9.1 is installed; run: pip install 'tinylora\[{extra}\]'"):
        loaded(folder, kind)


def test_unknown_kinds_and_devices_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="must be none, bnb-4bit"):
        loaded(folder, "gptq")
    source = quantise.Source(name="x", kind="folder", path=folder)
    with pytest.raises(UserError, match="runs on the CPU and on CUDA, not on mps"):
        quantise.check_quantisation("bnb-4bit", source, torch.device("mps"))


@pytest.mark.parametrize(("types", "ok"), [(("Q8_0", "F32"), True), (("F16",), True), (("Q4_K", "Q6_K"), False)])
def test_a_gguf_file_of_few_bits_is_not_quantised_again(
    tmp_path: Path, types: tuple[str, ...], ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for index, name in enumerate(types):
        kind = gguf.GGMLQuantizationType[name]
        values = np.random.default_rng(0).normal(size=(2, 256)).astype(np.float32)
        if name == "F16":
            writer.add_tensor(f"t{index}", values.astype(np.float16))
        elif name == "F32":
            writer.add_tensor(f"t{index}", values)
        else:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            packed = np.zeros((2, 256 // block * size), dtype=np.uint8)
            writer.add_tensor(f"t{index}", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(quantise.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(quantise, "version", lambda name: "9.0")
    source = quantise.Source(name="model.gguf", kind="gguf", path=path)
    if ok:
        quantise.check_quantisation("bnb-4bit", source, torch.device("cpu"))
    else:
        with pytest.raises(UserError, match=r"quantised already \(Q4_K, Q6_K\).*8 bits or more"):
            quantise.check_quantisation("bnb-4bit", source, torch.device("cpu"))


@needs_bnb
def test_a_checkpoint_that_is_quantised_is_not_quantised_again(folder: Path, tmp_path: Path) -> None:
    first = loaded(folder, "bnb-4bit")
    first.model.save_pretrained(tmp_path / "packed")
    first.tokenizer.save_pretrained(tmp_path / "packed")
    with pytest.raises(
        UserError, match="is quantised already, and model.quantization = bnb-8bit .* method qlora to lora"
    ):
        loaded(tmp_path / "packed", "bnb-8bit")
    ready = load_base_model(str(tmp_path / "packed"), device="cpu", dtype="float32")  # loads as it is
    assert identify(ready.model).fingerprint == identify(first.model).fingerprint


@needs_bnb
def test_four_bit_rows_that_bitsandbytes_reads_wrongly_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match="inputs, and bitsandbytes reads 4-bit rows .* take model.quantization"):
        loaded(tiny_folder, "bnb-4bit")  # 32 and 48 inputs


@needs_bnb
def test_such_rows_are_refused_in_a_checkpoint_that_came_quantised(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tinylora.models.load.refuse_broken_rows", lambda *_: None)
        first = loaded(tiny_folder, "bnb-4bit")
    first.model.save_pretrained(tmp_path / "packed")
    first.tokenizer.save_pretrained(tmp_path / "packed")
    with pytest.raises(UserError, match="inputs, and bitsandbytes reads 4-bit rows"):
        load_base_model(str(tmp_path / "packed"), device="cpu", dtype="float32")


@each_kind
def test_a_basis_from_the_gradient_of_a_quantised_base(folder: Path, tmp_path: Path, kind: str) -> None:
    config = tiny_config(folder, adapter={"basis": "gradient"}, train={"steps": 1}, generation={"max_new_tokens": 6})
    config = replace(config, model=replace(config.model, quantization=kind))
    done = train(config, ByteTask(), out=tmp_path / "runs", say=quiet)
    explicit = load_explicit(done.run / "basis.safetensors")
    assert explicit.modules[UP].U.shape == (128, 2) and explicit.modules[UP].V.shape == (64, 2)
    assert done.v.any()
