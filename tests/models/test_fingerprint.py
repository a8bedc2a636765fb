"""What base this is: the same however it was loaded, another as soon as a canonical weight differs."""

import hashlib
import os
import struct
import time
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from tinylora.adapter.attach import attach
from tinylora.adapter.config import AdapterConfig
from tinylora.models import fingerprint as module
from tinylora.models.bases import explain_difference, lookup, remember
from tinylora.models.fingerprint import Fingerprint, base_tensors, from_json, identify, to_json
from tinylora.models.load import load_base_model


def changed(model: PreTrainedModel, name: str, factor: float) -> None:
    with torch.no_grad():
        parameter = model.get_parameter(name)
        parameter.view(-1)[3] *= factor


def test_it_is_the_hash_that_format_md_specifies(tiny_qwen2: PreTrainedModel) -> None:
    """Computed once more from state_dict and hashlib."""
    state = {k: v for k, v in tiny_qwen2.state_dict().items() if k != "lm_head.weight"}  # tied to embed_tokens
    shapes = weights = ""
    for name in sorted(state, key=lambda n: n.encode("utf-32-be")):
        tensor = state[name].to(torch.bfloat16).contiguous()
        shape = "x".join(map(str, tensor.shape))
        digest = hashlib.sha256(tensor.view(torch.int16).numpy().astype("<i2").tobytes()).hexdigest()
        shapes += f"{name} {shape}\n"
        weights += f"{name} {shape} {digest}\n"
    # the tied head's name comes first in the order of code points
    assert sorted(base_tensors(tiny_qwen2))[0] == "lm_head.weight"
    shapes = shapes.replace("model.embed_tokens.weight", "lm_head.weight")
    weights = weights.replace("model.embed_tokens.weight", "lm_head.weight")
    shapes = "".join(sorted(shapes.splitlines(True)))
    weights = "".join(sorted(weights.splitlines(True)))
    found = identify(tiny_qwen2).fingerprint
    assert found.shape == hashlib.sha256(f"tinylora/shapes/1\nQwen2ForCausalLM\n{shapes}".encode()).digest()[:4]
    assert found.weights == hashlib.sha256(f"tinylora/weights/1\nQwen2ForCausalLM\n{weights}".encode()).digest()[:8]


def test_the_example_of_a_tied_head_in_format_md() -> None:
    """The page's numbers, by struct and hashlib from its words, and by us."""

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Module()
            self.model.embed, self.model.proj = nn.Embedding(3, 2), nn.Linear(2, 2, bias=False)
            self.lm_head = nn.Linear(2, 3, bias=False)
            self.lm_head.weight = self.model.embed.weight

    values = {"lm_head.weight": [k / 8 for k in range(-3, 3)], "model.proj.weight": [1.0, -0.5, 0.25, 2.0]}
    model = Tiny()
    for name, numbers in values.items():
        model.get_parameter(name).data.view(-1).copy_(torch.tensor(numbers))
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    page = text.partition("<!-- tied head -->\n")[2].partition("\n<!-- /tied head -->")[0]
    lines = ""
    for name, shape in (("lm_head.weight", "3x2"), ("model.proj.weight", "2x2")):
        data = b"".join(struct.pack("<f", number)[2:] for number in values[name])
        lines += f"{name} {shape} {hashlib.sha256(data).hexdigest()}\n"
    shapes = "".join(line.rpartition(" ")[0] + "\n" for line in lines.splitlines())
    first = hashlib.sha256(f"tinylora/shapes/1\nTiny\n{shapes}".encode()).digest()[:4]
    rest = hashlib.sha256(f"tinylora/weights/1\nTiny\n{lines}".encode()).digest()[:8]
    expected = "".join(f"    {line}\n" for line in lines.splitlines()) + f"\n    fingerprint {(first + rest).hex()}"
    assert page == expected
    assert identify(model).fingerprint.hex() == (first + rest).hex()


def test_dtypes_shards_and_adapters_do_not_matter(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    tiny_llama.to(torch.bfloat16)  # a bf16 checkpoint
    known = identify(tiny_llama).fingerprint
    assert identify(tiny_llama.float()).fingerprint == known
    tiny_llama.save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for dtype in (torch.float32, torch.bfloat16):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", dtype=dtype)
        assert identify(again).fingerprint == known
    adapter = attach(tiny_llama, AdapterConfig())
    adapter.write(torch.ones(adapter.num_groups, 1))
    assert identify(tiny_llama).fingerprint == known
    adapter.as_parameter()
    assert identify(tiny_llama).fingerprint == known
    adapter.detach()
    assert identify(tiny_llama).fingerprint == known


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_one_weight_makes_another_base(tiny_llama: PreTrainedModel, name: str) -> None:
    known = identify(tiny_llama).fingerprint
    changed(tiny_llama, name, 1.02)
    found = identify(tiny_llama).fingerprint
    assert found.shape == known.shape
    assert found.weights != known.weights
    changed(tiny_llama, name, 1 / 1.02)


def test_a_float16_cast_and_a_quantised_copy_are_other_bases(tiny_llama: PreTrainedModel) -> None:
    known = identify(tiny_llama)
    half = identify(tiny_llama.half()).fingerprint  # float32 weights, rounded twice
    assert half.shape == known.fingerprint.shape and half.weights != known.fingerprint.weights


def test_another_class_and_other_shapes_have_another_first_half(
    tiny_llama: PreTrainedModel, tiny_qwen2: PreTrainedModel
) -> None:
    assert identify(tiny_llama).fingerprint.shape != identify(tiny_qwen2).fingerprint.shape


def test_packed_weights_are_hashed_as_they_are() -> None:
    class Packed(nn.Module):
        def __init__(self, value: int) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.register_parameter(
                "weight", nn.Parameter(torch.full((4,), value, dtype=torch.uint8), requires_grad=False)
            )

    assert identify(Packed(1)).fingerprint != identify(Packed(2)).fingerprint
    assert identify(Packed(1)).fingerprint == identify(Packed(1)).fingerprint


@pytest.mark.parametrize("share", [0.001, 0.03, 0.3])
def test_the_distance_of_two_bases_is_estimated(tiny_llama: PreTrainedModel, share: float) -> None:
    before = {name: p.clone() for name, p in tiny_llama.named_parameters()}
    first = identify(tiny_llama)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in tiny_llama.parameters():
            p += share * p.norm() / p.numel() ** 0.5 * torch.randn(p.shape, generator=generator)
    low = lambda t: t.detach().bfloat16().double()  # noqa: E731
    squares = sum(float((low(p) - low(before[n])).square().sum()) for n, p in tiny_llama.named_parameters())
    exact = (squares / sum(float(p.detach().square().sum()) for p in before.values())) ** 0.5
    estimate = first.distance(identify(tiny_llama))
    assert estimate == pytest.approx(exact, rel=0.25)
    assert first.distance(first) == 0.0


def test_json_and_back(tiny_llama: PreTrainedModel) -> None:
    found = identify(tiny_llama)
    back = from_json(to_json(found))
    assert back.fingerprint == found.fingerprint and back.num_weights == found.num_weights
    assert Fingerprint.of(bytes(found.fingerprint)) == found.fingerprint
    assert back.distance(found) == pytest.approx(0.0, abs=1e-5)


def test_unchanged_files_are_hashed_once(tiny_folder: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base_model(str(tiny_folder), device="cpu", dtype="float32")
    calls = []
    real = module._identify
    monkeypatch.setattr(module, "_identify", lambda model: calls.append(1) or real(model))
    first = identify(base.model, base.files)
    assert identify(base.model, base.files).fingerprint == first.fingerprint
    assert len(calls) == 1
    for memo in (fresh_cache / "digests").glob("base-*.json"):
        memo.write_text("{")
    assert identify(base.model, base.files).fingerprint == first.fingerprint
    assert len(calls) == 2


def test_a_file_that_only_looks_untouched_is_hashed_again(tiny_folder: Path, fresh_cache: Path) -> None:
    """One weight of it changed, size and time of writing as before: the old fingerprint was still believed."""
    base = load_base_model(str(tiny_folder), device="cpu", dtype="float32")
    first = identify(base.model, base.files)
    (file,) = base.files
    before, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 0x10  # the exponent of the last number
    for _ in range(500):  # the clock of the file system ticks some times in a second
        file.write_bytes(data)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        if file.stat().st_ctime_ns != before.st_ctime_ns:
            break
        time.sleep(0.01)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    changed = load_base_model(str(tiny_folder), device="cpu", dtype="float32")
    assert identify(changed.model, changed.files).fingerprint != first.fingerprint
    assert remember(changed).fingerprint != first.fingerprint


def test_bases_seen_and_differences_in_words(tiny_folder: Path, fresh_cache: Path) -> None:
    base = load_base_model(str(tiny_folder), device="cpu", dtype="float32")
    identity = remember(base)
    seen = lookup(identity.fingerprint)
    assert seen is not None and seen.names == (str(tiny_folder.resolve()),)
    stranger = Fingerprint(identity.fingerprint.shape, b"12345678")
    assert "the right base has not been seen on this machine" in explain_difference(stranger, identity)
    assert "another architecture or other shapes" in explain_difference(Fingerprint(b"1234", b"12345678"), identity)
    with torch.no_grad():
        for p in base.model.parameters():
            p += 0.03 * p.abs().mean() * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    text = explain_difference(identity.fingerprint, identify(base.model))
    assert (
        "weights differ by" in text
        and "a quantised copy, or a fine-tune, of" in text
        and str(tiny_folder.resolve()) in text
    )
    (fresh_cache / "bases" / f"{identity.fingerprint.hex()}.json").write_text("[]")
    assert lookup(identity.fingerprint) is None
