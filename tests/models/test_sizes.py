"""Sizes that no model has, in a config.json or a GGUF file of some hundred bytes: refused before anything is made."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import AutoConfig

from tinylora.errors import UserError
from tinylora.models.sizes import BOUNDS, check_sizes

CHILD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**30, 3 * 2**30))
from tinylora.config.run import ModelConfig
from tinylora.errors import UserError
from tinylora.models.load import load_base_model
from tinylora.planning.shapes import shape_model
for name in sys.argv[1:]:
    load = lambda: load_base_model(name, device="cpu", dtype="float32")
    for use in (load, lambda: shape_model(ModelConfig(name=name))):
        try:
            use()
        except UserError as error:
            print("REFUSED", " ".join(str(error).split()))
        else:
            print("LOADED")
"""


def _told(*models: Path) -> list[str]:
    """What loading each model and telling its shape says, in a child that may not have more than 3 GiB."""
    command = [sys.executable, "-c", CHILD, *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def _with(folder: Path, changes: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_config_that_asks_for_too_much_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """Ten thousand million layers were an endless loop, and a vocabulary as large ended in the OOM killer."""
    asked = [
        ({"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers = 1,000,000,000"),
        ({"num_hidden_layers": 1e9, "layer_types": None}, "num_hidden_layers = 1,000,000,000"),
        ({"hidden_size": 10**9}, "hidden_size = 1,000,000,000"),
        ({"intermediate_size": 10**9}, "intermediate_size = 1,000,000,000"),
        ({"vocab_size": 10**9}, "vocab_size = 1,000,000,000"),
        ({"head_dim": 10**12}, "head_dim = 1,000,000,000,000"),
        ({"num_attention_heads": 10**9}, "num_attention_heads = 1,000,000,000"),
        ({"num_hidden_layers": 10**100, "layer_types": None}, "num_hidden_layers = 1"),
    ]
    folders = []
    for i, (changes, _) in enumerate(asked):
        folder = tmp_path / str(i)
        subprocess.run(["cp", "-r", str(tiny_folder), str(folder)], check=True, timeout=60)
        _with(folder, changes)
        folders.append(folder)
    told = _told(*folders)
    assert len(told) == 2 * len(asked)
    for i, (_, sentence) in enumerate(asked):
        for line in told[2 * i : 2 * i + 2]:
            assert line.startswith("REFUSED") and sentence in line and "are allowed" in line, line


def test_sizes_within_bounds_that_the_files_cannot_hold(tiny_folder: Path) -> None:
    """A vocabulary of ten million is allowed, and would be made anew before it is noticed to be missing."""
    _with(tiny_folder, {"vocab_size": 10_000_000})
    loaded, _ = _told(tiny_folder)
    assert "has 640,023,264 weights by its description, and its files have room for " in loaded


def _gguf(path: Path, **sizes: int) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    stated = {
        "block_count": 1, "embedding_length": 32, "feed_forward_length": 64, "attention.head_count": 4,
        "attention.head_count_kv": 4, "context_length": 64, "vocab_size": 8, **sizes,
    }  # fmt: skip
    for key, value in stated.items():
        writer.add_uint64(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_that_asks_for_too_much_is_refused(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"block_count": 10**9, "embedding_length": 10**9, "feed_forward_length": 10**10, "vocab_size": 10**9}
    told = _told(*(_gguf(tmp_path / f"{key}.gguf", **{key: value}) for key, value in sizes.items()))
    for line, key in zip(told, [key for key in sizes for _ in range(2)], strict=True):
        assert line.startswith("REFUSED") and f"states {key} = 1" in line, line


def test_nested_descriptions_count_too() -> None:
    with pytest.raises(UserError, match=r"text_config|num_hidden_layers = 1,000,000"):
        check_sizes("x", {"text_config": {"num_hidden_layers": 10**6}})
    with pytest.raises(UserError, match=r"states 4,000 layers of 60,000 experts, 240,000,000 in all"):
        check_sizes("x", {"num_hidden_layers": 4000, "num_local_experts": 60000})


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 126, "hidden_size": 16384, "vocab_size": 128256, "intermediate_size": 53248},
        {"num_hidden_layers": 61, "n_routed_experts": 384, "hidden_size": 7168, "max_position_embeddings": 262144},
        {"text_config": {"num_hidden_layers": 48, "max_position_embeddings": 10485760, "num_local_experts": 128}},
        {"max_position_embeddings": 2**31, "sliding_window": 2**31, "rope_theta": 1e12, "initializer_range": 1e300},
        {"num_hidden_layers": None, "hidden_size": True, "vocab_size": 262400, "pad_token_id": 10**9},
    ],
)
def test_the_largest_models_are_far_from_the_bounds(sizes: dict[str, Any]) -> None:
    check_sizes("x", sizes)


def test_every_size_of_the_usual_architectures_is_bounded() -> None:
    """So that a new name for an old thing is noticed: of each, all numbers that a layer is made of."""
    sizes = ("layer", "head", "hidden", "intermediate", "vocab", "embd", "expert")
    ignored = ("id", "interval", "per_tok", "first", "window", "coef", "step", "top_k", "group")
    for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2", "mixtral", "phi3", "olmo2", "qwen3_moe"):
        for key, value in AutoConfig.for_model(kind).to_dict().items():
            if not isinstance(value, int) or isinstance(value, bool) or not any(part in key for part in sizes):
                continue
            if any(part in key for part in ignored):
                continue
            assert any(pattern.search(key) for pattern, _, _ in BOUNDS), (kind, key)
