"""GGUF files: unpacked once, to the numbers that the blocks stand for, and never quietly to others."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

import tinylora.models.gguf as conversion
from tinylora.errors import UserError
from tinylora.models.base import BaseModel
from tinylora.models.load import load_base_model
from tinylora.system.digest import sha256_of
from tinylora.system.progress import Bar

Array = NDArray[np.float32]
WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS = 32, 64, 2, 4, 2


def _q8_0(x: Array) -> tuple[NDArray[np.uint8], Array]:
    """Q8_0 blocks of x, and the numbers they stand for: 32 int8 times one float16 scale."""
    blocks = x.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    q = np.round(blocks / scale.astype(np.float32)).clip(-127, 127).astype(np.int8)
    packed = np.concatenate([scale.view(np.uint8), q.view(np.uint8)], axis=1)
    return packed.reshape(x.shape[0], -1), (q.astype(np.float32) * scale.astype(np.float32)).reshape(x.shape)


def _round_to_bf16(x: Array) -> Array:
    """Nearest even, by the bits."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def _write_qwen2(
    path: Path,
    *,
    untied: bool,
    architecture: str = "qwen2",
    metadata: dict[str, str | float] | None = None,
    extra: dict[str, list[float]] | None = None,
) -> dict[str, Array]:
    """Write a tiny Qwen2 as GGUF, matrices in Q8_0, and return what its tensors stand for.

    `metadata` has further keys after the architecture's name, `extra` further tensors in float32.
    """
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    for key, value in (metadata or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{architecture}.{key}", value)  # type: ignore[arg-type]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")

    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(tokens), WIDTH), "output_norm.weight": (WIDTH,)}
    if untied:
        shapes["output.weight"] = (len(tokens), WIDTH)
    kv = WIDTH // HEADS * KV_HEADS
    for i in range(LAYERS):
        per_layer = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (kv, WIDTH)}
        per_layer |= {"attn_v": (kv, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_gate": (HIDDEN, WIDTH)}
        per_layer |= {"ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in per_layer.items()}
        shapes |= {f"blk.{i}.attn_{x}.bias": (WIDTH if x == "q" else kv,) for x in "qkv"}
    truth = {}
    for name, shape in shapes.items():
        x = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 2:
            packed, truth[name] = _q8_0(x)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            truth[name] = x
            writer.add_tensor(name, x)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, np.array(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return truth


def _load(path: Path, **options: Any) -> BaseModel:
    return load_base_model(str(path), device="cpu", **{"dtype": "float32", **options})


def test_a_bar_counts_the_tensors_that_are_unpacked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers tells of them by a bar of its own alone, whose text is read."""
    path = tmp_path / "tiny.gguf"
    truth = _write_qwen2(path, untied=True)
    bar = Bar("unpacking", None, "tensors")
    conversion._read(path, bar)
    assert bar.count() == f"{len(truth)}/{len(truth)} tensors"
    assert "quantizing" not in capfd.readouterr().err
    heard = conversion._Heard(bar)
    heard.write("Converting and de-quantizing GGUF tensors...:  12%|█▏ | 33/272 [00:03<00:25,  9.30it/s]")
    heard.write("a line such as 1/2: of something else")
    assert bar.count() == "33/272 tensors"


@pytest.mark.parametrize("untied", [True, False])
def test_weights_are_the_blocks_rounded_to_bf16(tmp_path: Path, fresh_cache: Path, untied: bool) -> None:
    path = tmp_path / "tiny.gguf"
    truth = _write_qwen2(path, untied=untied)
    base = _load(path)
    assert (base.kind, base.sha256, base.context_length) == ("gguf", sha256_of(path), 64)
    assert base.has_chat_template and base.stop_token_ids == (2, 0)
    assert base.files == (fresh_cache / "converted" / base.sha256 / "model.safetensors",)
    weights = {name: p.numpy() for name, p in base.model.state_dict().items()}
    pairs = {
        "token_embd": "model.embed_tokens",
        "blk.1.attn_q": "model.layers.1.self_attn.q_proj",
        "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
        "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
        "output_norm": "model.norm",
    }
    for theirs, ours in pairs.items():
        np.testing.assert_array_equal(weights[f"{ours}.weight"], _round_to_bf16(truth[f"{theirs}.weight"]))
    head = truth["output.weight" if untied else "token_embd.weight"]
    np.testing.assert_array_equal(weights["lm_head.weight"], _round_to_bf16(head))
    assert base.model.config.tie_word_embeddings is not untied


def test_second_load_reads_the_copy_and_is_silent(
    tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.gguf"
    _write_qwen2(path, untied=True)
    first = _load(path)
    assert "unpacking tiny.gguf" in capfd.readouterr().err
    monkeypatch.setattr(conversion, "_read", lambda _: pytest.fail("unpacked again"))
    second = _load(path, dtype="bfloat16")
    assert capfd.readouterr() == ("", "")
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b.float())  # float32 and bf16 loads are one model


@pytest.mark.parametrize("harm", ["truncate", "flip", "no marker", "old format"])
def test_a_spoilt_copy_is_made_again(tmp_path: Path, fresh_cache: Path, harm: str) -> None:
    path = tmp_path / "tiny.gguf"
    _write_qwen2(path, untied=True)
    first = _load(path)
    good = first.files[0].read_bytes()
    marker = first.files[0].parent / "conversion.json"
    if harm == "truncate":
        first.files[0].write_bytes(good[:-100])
    elif harm == "flip":
        first.files[0].write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif harm == "no marker":
        marker.unlink()
    else:
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format": 0}))
    assert _load(path).files[0].read_bytes() == good


def test_a_changed_file_is_another_model(tmp_path: Path, fresh_cache: Path) -> None:
    path = tmp_path / "tiny.gguf"
    _write_qwen2(path, untied=True)
    first = _load(path)
    _write_qwen2(path, untied=False)
    assert _load(path).sha256 != first.sha256


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, fresh_cache: Path) -> None:
    path = tmp_path / "cut.gguf"
    _write_qwen2(path, untied=True)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"GGUF file .*cut\.gguf is damaged or not well-formed"):
        _load(path)
    assert not [p for p in (fresh_cache / "converted").iterdir() if not p.name.endswith(".lock")]


def test_header_only(tmp_path: Path, fresh_cache: Path) -> None:
    path = tmp_path / "head.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(UserError, match="is damaged"):
        _load(path)


def test_architecture_that_transformers_does_not_know(tmp_path: Path, fresh_cache: Path) -> None:
    path = tmp_path / "odd.gguf"
    _write_qwen2(path, untied=True, architecture="hyperllama")
    with pytest.raises(UserError, match=r"transformers 5.* cannot load the GGUF file .*hyperllama"):
        _load(path)


@pytest.mark.parametrize(
    ("metadata", "extra", "found"),
    [
        ({}, {"rope_freqs.weight": [1, 1, 8, 32]}, r"the tensor rope_freqs\.weight, factors from 1 to 32"),
        ({}, {"rope_factors_long.weight": [1, 2]}, r"the tensor rope_factors_long\.weight, factors from 1 to 2"),
        ({}, {"rope_factors_short.weight": [0.5, 1]}, r"the tensor rope_factors_short\.weight, factors from 0\.5 to 1"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            {},
            r"qwen2\.rope\.scaling\.type = yarn, qwen2\.rope\.scaling\.factor = 4\.0",
        ),
        ({"rope.scaling.type": "longrope"}, {}, r"qwen2\.rope\.scaling\.type = longrope"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0, "rope.scaling.attn_factor": 1.5},
            {},
            "factor = 1.5",
        ),
        ({"rope.scaling.factor": 2.0}, {}, r"qwen2\.rope\.scaling\.factor = 2\.0"),  # linear, where no type is given
        ({"rope.scale_linear": 8.0}, {}, r"qwen2\.rope\.scale_linear = 8\.0"),
        ({"rope.scaling.type": "none"}, {"rope_freqs.weight": [1, 2]}, r"the tensor rope_freqs\.weight, .*"),
    ],
)
def test_scaled_positions_are_refused(
    tmp_path: Path, fresh_cache: Path, metadata: dict[str, str | float], extra: dict[str, list[float]], found: str
) -> None:
    """transformers would load each of these as if its positions were not scaled."""
    path = tmp_path / "scaled.gguf"
    _write_qwen2(path, untied=True, metadata=metadata, extra=extra)
    with pytest.raises(
        UserError, match=rf"scaled\.gguf scales its rotary positions \(.*{found}\).*safetensors instead"
    ):
        _load(path)


@pytest.mark.parametrize(
    "metadata",
    [
        {"rope.scaling.type": "none", "rope.scaling.factor": 8.0},
        {"rope.scaling.type": "linear"},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0, "rope.scaling.attn_factor": 1.0},
        {"rope.scaling.factor": 0.0, "rope.scaling.original_context_length": 32.0},
    ],
)
def test_factors_of_one_scale_nothing(tmp_path: Path, fresh_cache: Path, metadata: dict[str, str | float]) -> None:
    path = tmp_path / "plain.gguf"
    _write_qwen2(path, untied=True, metadata=metadata, extra={"rope_freqs.weight": [1, 1, 1, 1]})
    assert _load(path).context_length == 64


@pytest.mark.parametrize(("factors", "fits"), [([1, 1e30, 1e30, 1e30], True), ([1, 1, 1e30, 1e30], False)])
def test_the_unrotated_channels_of_gemma_4(tmp_path: Path, factors: list[float], fits: bool) -> None:
    """A Gemma 4 file marks with 1e30 the three quarters that transformers does not rotate, either."""
    path = tmp_path / "gemma.gguf"
    _write_qwen2(path, untied=True, architecture="gemma4", extra={"rope_freqs.weight": factors})
    if fits:
        conversion._refuse_scaled_positions(path)
    else:
        with pytest.raises(UserError, match="scales its rotary positions"):
            conversion._refuse_scaled_positions(path)


def test_a_copy_of_a_scaled_file_from_before_is_not_used(
    tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scaled.gguf"
    _write_qwen2(path, untied=True, extra={"rope_freqs.weight": [1, 1, 8, 32]})
    with monkeypatch.context() as before:
        before.setattr(conversion, "FORMAT", 1)
        before.setattr(conversion, "_refuse_scaled_positions", lambda _: None)
        _load(path)
    with pytest.raises(UserError, match="scales its rotary positions"):
        _load(path)


def test_an_adapter_beside_the_file_is_refused(tmp_path: Path, fresh_cache: Path) -> None:
    """transformers would apply it, or load the base that it names in place of the file."""
    path = tmp_path / "tiny.gguf"
    _write_qwen2(path, untied=True)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"beside the model tiny\.gguf .*adapter_config\.json.*into another folder"):
        _load(path)


def test_not_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(UserError, match=r"is not a GGUF file \(it begins with b'PK"):
        _load(path)


def test_no_room(tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.gguf"
    _write_qwen2(path, untied=True)

    class Full:
        free = 10

    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: Full)
    with pytest.raises(UserError, match="no room to unpack .* 0 MB free"):
        _load(path)


def _renamed(path: Path, old: bytes, new: bytes) -> Path:
    assert len(old) == len(new) and path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


@pytest.mark.parametrize("untied", [True, False])
@pytest.mark.parametrize(
    ("old", "new", "lacks"),
    [
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_zz.weight", r"lack 1 tensors, model\.layers\.1\.mlp\.up_proj\.weight"),
        (b"blk.0.attn_q.bias", b"blk.0.attn_z.bias", r"lack 1 tensors, model\.layers\.0\.self_attn\.q_proj\.bias"),
        (b"token_embd.weight", b"token_zzzz.weight", r"lack . tensors, .*model\.embed_tokens\.weight"),
    ],
)
def test_a_tensor_that_is_not_there_is_never_made_up(
    tmp_path: Path, fresh_cache: Path, untied: bool, old: bytes, new: bytes, lacks: str
) -> None:
    """transformers draws it anew: such a file could be trained on for hours. A tied head is no such tensor."""
    path = tmp_path / "lacks.gguf"
    _write_qwen2(path, untied=untied)
    with pytest.raises(UserError, match=rf"the weights of .*lacks\.gguf {lacks}; fetch it again, whole"):
        _load(_renamed(path, old, new))


def test_a_head_under_another_name_is_not_taken_for_a_tied_one(tmp_path: Path, fresh_cache: Path) -> None:
    """Without `output.weight` the embeddings are the head, which is another model."""
    path = tmp_path / "headless.gguf"
    _write_qwen2(path, untied=True)
    with pytest.raises(UserError, match=r"has no place for 1 tensors of .*headless\.gguf \(outpuz\.weight\)"):
        _load(_renamed(path, b"\x0d" + bytes(7) + b"output.weight", b"\x0d" + bytes(7) + b"outpuz.weight"))


def test_a_bias_that_transformers_drops_is_refused_and_another_tensor_named(
    tmp_path: Path, fresh_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "more.gguf"
    _write_qwen2(path, untied=True, extra={"blk.0.attn_output.bias": [1.0] * WIDTH})
    with pytest.raises(UserError, match=r"has no place for 1 tensors .*\(blk\.0\.attn_output\.bias\)"):
        _load(path)
    _write_qwen2(path, untied=True, extra={"blk.0.of_another_program": [1.0, 2.0]})
    assert _load(path).context_length == 64
    assert "transformers leaves out 1 tensors of more.gguf (blk.0.of_another_program)" in capfd.readouterr().err


def test_a_copy_with_weights_made_up_before_is_not_used(
    tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lacks.gguf"
    _write_qwen2(path, untied=True)
    _renamed(path, b"blk.1.ffn_up.weight", b"blk.1.ffn_zz.weight")
    with monkeypatch.context() as before:
        before.setattr(conversion, "FORMAT", 2)
        before.setattr(conversion, "refuse_missing", lambda *_: None)
        before.setattr(conversion, "_check_dropped", lambda *_: None)
        _load(path)
    with pytest.raises(UserError, match="lack 1 tensors"):
        _load(path)
