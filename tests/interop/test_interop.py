"""Adapters in other tools' formats, each put to the tool itself: the same logits, and what is not covered is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, TinyLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tinylora.adapter.attach import AttachedAdapter, attach, attach_explicit
from tinylora.adapter.config import AdapterConfig
from tinylora.adapter.explicit import ExplicitFactors, ExplicitModule, load_explicit, save_explicit
from tinylora.errors import UserError
from tinylora.interop.gguf_lora import write_gguf
from tinylora.interop.lora import lora_factors, write_lora
from tinylora.interop.merged import merge_report, write_merged
from tinylora.interop.peft_tinylora import read_peft, write_peft

pytestmark = [  # PEFT's own: it calls what transformers 5.24 renamed, and says what the tests are about
    pytest.mark.filterwarnings("ignore:.(is_gradient_checkpointing|past_key_values). is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not save projection tensors"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers."),
]
IDS = torch.arange(3, 27).reshape(2, 12)
Build = Callable[[], PreTrainedModel]


@pytest.fixture(params=["tiny_llama", "tiny_qwen2", "tiny_gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.getfixturevalue(request.param)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def trained(model: PreTrainedModel, scale: float = 0.5, **config: Any) -> AttachedAdapter:
    adapter = attach(model, AdapterConfig(**config))
    generator = torch.Generator().manual_seed(1)
    adapter.write(scale * torch.randn(adapter.num_groups, adapter.config.u, generator=generator))
    return adapter


def peft_checkpoint(model: PreTrainedModel, folder: Path, **config: Any) -> torch.Tensor:
    """A checkpoint that PEFT wrote, with numbers in its vectors; returns PEFT's own logits."""
    settings = {"r": 2, "u": 3, "weight_tying": 0.4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    peft = get_peft_model(model, TinyLoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "tinylora_v" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    found = logits(peft)
    peft.save_pretrained(folder)
    peft.unload()
    return found


# --- PEFT's TinyLoRA ---


@pytest.mark.parametrize("tying", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("saved", [True, False], ids=["P saved", "P drawn again"])
def test_a_checkpoint_of_peft_gives_pefts_logits(
    model: PreTrainedModel, tmp_path: Path, tying: float, saved: bool
) -> None:
    untrained = logits(model)
    expected = peft_checkpoint(model, tmp_path / "peft", weight_tying=tying, save_projection=saved)
    assert torch.equal(logits(model), untrained)
    imported = read_peft(tmp_path / "peft", model)
    assert ("drawn again with torch" in imported.note) != saved
    adapter = attach_explicit(model, imported.explicit)
    adapter.write(imported.explicit.v)
    assert float((expected - untrained).abs().max()) > 0.1
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    (tmp_path / "mine.safetensors").write_bytes(save_explicit(imported.explicit))
    adapter.detach()
    again = load_explicit(tmp_path / "mine.safetensors")
    attach_explicit(model, again).write(again.v)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_a_bfloat16_base_had_its_projections_rounded(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    tiny_llama.to(torch.bfloat16)
    peft_checkpoint(tiny_llama, tmp_path / "saved", save_projection=True)
    peft_checkpoint(tiny_llama, tmp_path / "drawn", save_projection=False)
    saved, drawn = (read_peft(tmp_path / name, tiny_llama).explicit for name in ("saved", "drawn"))
    for path, module in saved.modules.items():
        assert torch.equal(module.P, drawn.modules[path].P)


def test_the_split_is_converted_exactly() -> None:
    """dW = B R A of PEFT, in float64 NumPy, is U S R' V^T of ours."""
    rng = np.random.default_rng(0)
    A, B, P, v = rng.normal(size=(3, 7)), rng.normal(size=(5, 3)), rng.normal(size=(2, 3, 3)), rng.normal(size=2)
    module = ExplicitModule.from_split(*map(torch.from_numpy, (B, A, P)), 0)
    U, S, V, Pp = (t.numpy() for t in (module.U, module.S, module.V, module.P))
    meant = B @ np.einsum("u,uij->ij", v, P) @ A
    np.testing.assert_allclose(np.einsum("oi,i,u,uij,nj->on", U, S, v, Pp, V), meant, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(np.linalg.norm(U, axis=0), 1, rtol=1e-14)
    root = np.array([2.0, 1.0, 0.5])  # a real sqrt split gives the factor sqrt(s_j / s_i)
    split = ExplicitModule.from_split(*map(torch.from_numpy, (U * root, (V * root).T, P)), 0)
    np.testing.assert_allclose(split.P.numpy(), P * (root[None, :] / root[:, None]), rtol=1e-12)


@pytest.mark.parametrize("config", [{"n_tie": 4}, {"num_groups": 3, "u": 2}, {"tying": "structured"}, {"rank": 3}])
def test_what_we_write_loads_in_peft(model: PreTrainedModel, tmp_path: Path, config: dict[str, Any]) -> None:
    untrained = logits(model)
    adapter = trained(model, **config)
    ours, count = logits(model), adapter.num_trained
    write_peft(tmp_path / "peft", adapter, base_name="tiny")
    adapter.detach()
    peft = PeftModel.from_pretrained(model, tmp_path / "peft", is_trainable=True)
    assert float((ours - untrained).abs().max()) > 0.1
    torch.testing.assert_close(logits(peft), ours, rtol=0, atol=1e-5)
    assert sum(p.numel() for p in peft.parameters() if p.requires_grad) == count
    peft.unload()


def test_a_round_trip_through_peft(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    adapter = trained(tiny_llama, n_tie=4)
    deltas = {path: adapter.delta(path) for path in adapter.paths}
    write_peft(tmp_path / "peft", adapter, base_name="tiny")
    adapter.detach()
    back = read_peft(tmp_path / "peft", tiny_llama).explicit
    adapter = attach_explicit(tiny_llama, back)
    for path, delta in deltas.items():
        torch.testing.assert_close(adapter.delta(path, back.v), delta, rtol=1e-5, atol=1e-7)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.tinylora_"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: edit(f, peft_type="LORA"), "of type LORA; only TINYLORA"),
        (lambda f: edit(f, bias="all"), "bias='all'"),
        (lambda f: edit(f, modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "pickled, which could run code"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 100), "is damaged"),
        (lambda f: retensor(f, lambda t: t.update({"base_model.model.lm_head.bias": torch.ones(2)})), "lm_head.bias"),
        (
            lambda f: retensor(
                f, lambda t: t.update({"base_model.model.model.embed_tokens.tinylora_A": torch.ones(2, 2)})
            ),
            "holds an embedding",
        ),
        (lambda f: retensor(f, lambda t: t.pop(FIRST + "B") is None), "lacks tinylora_B"),
        (lambda f: retensor(f, lambda t: t.update({FIRST + "A": torch.ones(2, 5)})), "do not fit a map"),
        (lambda f: retensor(f, lambda t: t.update({FIRST + "A": t[FIRST + "A"] * torch.nan})), "not finite"),
        (lambda f: retensor(f, lambda t: t.pop("base_model.tinylora_v.1") is None), "are numbered"),
        (lambda f: retensor(f, lambda t: t.pop(FIRST + "P") is None), "of some modules and not of others"),
        (lambda f: edit(f, weight_tying=0.0), "is the base the right one"),
    ],
)
def test_what_cannot_be_imported_is_named(
    tiny_llama: PreTrainedModel, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    peft_checkpoint(tiny_llama, tmp_path / "peft")
    spoil(tmp_path / "peft")
    with pytest.raises(UserError, match=message):
        read_peft(tmp_path / "peft", tiny_llama)


@pytest.mark.parametrize("version", ["0.19.1", None, "0"])
def test_projections_of_peft_before_0_20_are_lost(
    tiny_llama: PreTrainedModel, tmp_path: Path, version: str | None
) -> None:
    peft_checkpoint(tiny_llama, tmp_path / "peft", save_projection=False)
    edit(tmp_path / "peft", peft_version=version)
    with pytest.raises(UserError, match="changed with every Python process and are lost"):
        read_peft(tmp_path / "peft", tiny_llama)
    edit(tmp_path / "peft", peft_version="0.20.0")
    assert read_peft(tmp_path / "peft", tiny_llama).note


def test_a_targeted_embedding_of_peft_is_refused(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    peft_checkpoint(tiny_llama, tmp_path / "peft", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(UserError, match="embedding"):
        read_peft(tmp_path / "peft", tiny_llama)


def test_another_base_is_refused(tiny_llama: PreTrainedModel, tiny_gpt2: PreTrainedModel, tmp_path: Path) -> None:
    peft_checkpoint(tiny_llama, tmp_path / "peft")
    with pytest.raises(UserError, match="which the base does not have"):
        read_peft(tmp_path / "peft", tiny_gpt2)
    explicit = read_peft(tmp_path / "peft", tiny_llama).explicit
    with pytest.raises(UserError, match="which this model does not have"):
        attach_explicit(tiny_gpt2, explicit)


# --- plain LoRA ---


@pytest.mark.parametrize("rank", [0, 2, 8])
def test_lora_loads_in_peft(model: PreTrainedModel, tmp_path: Path, rank: int) -> None:
    adapter = trained(model)
    ours = logits(model)
    written = write_lora(tmp_path / "lora", adapter, base_name="tiny", rank=rank)
    adapter.detach()
    assert (written.rank, written.kept) == (rank or 2, 1.0)
    peft = PeftModel.from_pretrained(model, tmp_path / "lora")
    assert isinstance(peft.peft_config["default"], LoraConfig)
    torch.testing.assert_close(logits(peft), ours, rtol=0, atol=1e-5)
    peft.unload()


def test_some_layers_alone_touch_nothing_else(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    adapter = trained(tiny_llama, targets=("model.layers.1.*",))
    ours = logits(tiny_llama)
    write_lora(tmp_path / "lora", adapter, base_name="tiny")
    write_peft(tmp_path / "peft", adapter, base_name="tiny")
    adapter.detach()
    for name in ("lora", "peft"):
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["target_modules"] == sorted(
            adapter.paths
        )
        loaded = PeftModel.from_pretrained(tiny_llama, tmp_path / name)
        torch.testing.assert_close(logits(loaded), ours, rtol=0, atol=1e-5)
        loaded.unload()


def test_the_file_conventions_of_servers(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    """What vLLM and SGLang read: names, shapes, r, lora_alpha and no bias."""
    adapter = trained(tiny_llama)
    write_lora(tmp_path / "lora", adapter, base_name="org/base", revision="abc", rank=8, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 8, 8, "none")
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "abc")
    assert set(config["target_modules"]) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert len(tensors) == 2 * 21
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    assert tensors[f"{q}.lora_A.weight"].shape == (8, 32) and tensors[f"{q}.lora_B.weight"].shape == (32, 8)


def test_a_smaller_rank_keeps_the_best_part(tiny_llama: PreTrainedModel) -> None:
    adapter = trained(tiny_llama, rank=3)
    cut = lora_factors(adapter, 1)
    kept = total = 0.0
    for path in adapter.paths:
        singular = np.linalg.svd(adapter.delta(path).numpy(), compute_uv=False)
        found = (cut.B[path] @ cut.A[path]).numpy()
        np.testing.assert_allclose(np.linalg.svd(found, compute_uv=False)[:2], [singular[0], 0], atol=1e-10)
        kept, total = kept + singular[0] ** 2, total + (singular**2).sum()
    assert cut.kept == pytest.approx(kept / total) and cut.kept < 1
    with pytest.raises(UserError, match="LoRA rank must be from 1"):
        lora_factors(adapter, -1)


def test_an_adapter_on_the_output_head_is_refused_by_lora(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    adapter = trained(tiny_llama, targets=("all-linear", "lm_head"))
    with pytest.raises(UserError, match="output head"):
        write_lora(tmp_path / "lora", adapter, base_name="tiny")


def test_a_folder_in_use_is_left_alone(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine.txt").write_text("x")
    adapter = trained(tiny_llama)
    for write in (
        lambda: write_lora(tmp_path / "lora", adapter, base_name="t"),
        lambda: write_peft(tmp_path / "lora", adapter, base_name="t"),
        lambda: write_merged(tmp_path / "lora", adapter),
    ):
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            write()
    assert [p.name for p in (tmp_path / "lora").iterdir()] == ["mine.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]


# --- GGUF ---


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's own rule, written down once more: row 2 i + j of a head is row i of its half j."""
    out = np.empty_like(rows)
    size = len(rows) // heads
    for h in range(heads):
        for i in range(size // 2):
            for j in range(2):
                out[h * size + 2 * i + j] = rows[h * size + j * size // 2 + i]
    return out


@pytest.mark.parametrize(("fixture", "arch"), [("tiny_llama", "llama"), ("tiny_qwen2", "qwen2")])
def test_gguf_holds_the_update(request: pytest.FixtureRequest, tmp_path: Path, fixture: str, arch: str) -> None:
    model = request.getfixturevalue(fixture)
    adapter = trained(model)
    path = tmp_path / "adapter.gguf"
    write_gguf(path, adapter, rank=4)
    reader = gguf.GGUFReader(path)
    field = lambda name: reader.fields[name].contents()  # noqa: E731
    assert (field("general.architecture"), field("general.type"), field("adapter.type")) == (arch, "adapter", "lora")
    assert field("adapter.lora.alpha") == 4.0
    tensors = {t.name: t.data for t in reader.tensors}
    assert len(tensors) == 2 * len(adapter.paths)
    names = {
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
        "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    for module in adapter.paths:
        kind, layer = module.rsplit(".", 1)[-1], module.split(".")[2]
        a, b = (tensors[f"blk.{layer}.{names[kind]}.weight.lora_{x}"] for x in "ab")
        delta = adapter.delta(module).numpy()
        if arch == "llama" and kind in ("q_proj", "k_proj"):
            delta = permuted(delta, 4 if kind == "q_proj" else 2)
        assert a.shape == (4, delta.shape[1]) and b.shape == (delta.shape[0], 4)
        np.testing.assert_allclose(b @ a, delta, rtol=0, atol=1e-6 * np.abs(delta).max())


def test_a_full_disk_leaves_no_gguf(
    tiny_llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any) -> None:
        raise OSError("2048 requested and 1296 written")  # as numpy says it, without a number

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(UserError, match=r"no room to write in .* \(No space left on device\)"):
        write_gguf(tmp_path / "a.gguf", trained(tiny_llama))
    assert not list(tmp_path.iterdir())


def test_gguf_is_refused_where_it_would_be_wrong(
    tiny_gpt2: PreTrainedModel, tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="this is a GPT2LMHeadModel; export to lora"):
        write_gguf(tmp_path / "a.gguf", trained(tiny_gpt2))
    adapter = trained(tiny_llama)
    with pytest.raises(UserError, match="float32 or float16, not bfloat16"):
        write_gguf(tmp_path / "a.gguf", adapter, dtype=torch.bfloat16)
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        write_gguf(tmp_path / "a.gguf", adapter)
    assert (tmp_path / "a.gguf").read_text() == "mine"


# --- merged weights ---


def test_a_merged_model_answers_as_the_adapter_does(model: PreTrainedModel, tmp_path: Path) -> None:
    adapter = trained(model)
    ours = logits(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = write_merged(tmp_path / "merged", adapter)
    assert report.is_whole and report.total == pytest.approx(1, abs=1e-4) and report.error < 1e-3
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), ours)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), ours, rtol=0, atol=1e-4)
    assert not any(
        "tinylora" in name or ".base." in name for name in load_file(tmp_path / "merged" / "model.safetensors")
    )


def test_a_merge_in_bfloat16_loses_small_updates_and_says_so(tiny_llama: PreTrainedModel) -> None:
    tiny_llama.to(torch.bfloat16)
    adapter = trained(tiny_llama, scale=1e-4)
    lost = merge_report(adapter, adapter.merged_weights())
    assert not lost.is_whole and lost.total < 0.9 and lost.error > 0.5
    meant = sum(float(adapter.delta(p).square().sum()) for p in adapter.paths)
    merged = adapter.merged_weights()
    inner = sum(
        float(((merged[p].double() - adapter.base_weight(p).double()) * adapter.delta(p)).sum()) for p in adapter.paths
    )
    assert lost.total == pytest.approx(inner / meant)
    adapter.write(0.5 * torch.ones_like(adapter.read()))
    assert merge_report(adapter, adapter.merged_weights()).is_whole


# --- explicit files that are wrong ---


def explicit_of(model: PreTrainedModel) -> ExplicitFactors:
    adapter = trained(model)
    modules = {
        p: ExplicitModule(f.U, f.S, f.V, torch.from_numpy(adapter.projections[p]), g)
        for (p, f), g in zip(adapter.factors.items(), adapter.groups, strict=True)
    }
    found = ExplicitFactors(adapter.read(), modules, "test")
    adapter.detach()
    return found


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t, m: t.pop("v") is None, "is damaged"),
        (lambda t, m: t.update(v=t["v"] * torch.nan), "not finite"),
        (lambda t, m: t.update(v=t["v"].double()), "not \\(groups, u\\) in float32"),
        (lambda t, m: t.update({"U.x": torch.ones(2)}), "not those of the modules"),
        (
            lambda t, m: t.update({next(k for k in t if k.startswith("P.")): torch.ones(1, 2, 3)}),
            "do not fit each other",
        ),
        (lambda t, m: m.update(groups="[]"), "not those of the modules"),
        (lambda t, m: m.update(groups=m["groups"].replace(": 0", ": 99", 1)), "in tie group 99"),
        (lambda t, m: m.update(groups="{"), "is damaged"),
        (lambda t, m: m.update(format="pt"), "is no adapter with factors"),
    ],
)
def test_an_explicit_file_that_is_wrong_is_refused(
    tiny_llama: PreTrainedModel, tmp_path: Path, spoil: Callable[[Any, Any], None], message: str
) -> None:
    from safetensors import safe_open

    path = tmp_path / "a.safetensors"
    path.write_bytes(save_explicit(explicit_of(tiny_llama)))
    tensors = load_file(path)
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
    spoil(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=message):
        load_explicit(path)
