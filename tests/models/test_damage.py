"""A model's files, each harmed in the ways that files are: one sentence that names the file, never a traceback."""

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tinylora.config.run import ModelConfig
from tinylora.errors import UserError
from tinylora.models.load import load_base_model
from tinylora.planning.shapes import shape_model


def _load(path: Path) -> Any:
    return load_base_model(str(path), device="cpu", dtype="float32")


class Evil:
    """Would make a file, if its pickle were run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def pickled(tiny_folder: Path) -> Path:
    """The tiny model with its weights in pytorch_model.bin."""
    weights = load_file(tiny_folder / "model.safetensors")
    (tiny_folder / "model.safetensors").unlink()
    torch.save(weights, tiny_folder / "pytorch_model.bin")
    return tiny_folder


def test_pickled_weights_load(pickled: Path) -> None:
    assert _load(pickled).files == (pickled / "pytorch_model.bin",)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_would_run_code_is_refused_in_words(pickled: Path, tmp_path: Path, new_format: bool) -> None:
    """It was a traceback of torch's UnpicklingError."""
    file, mark = pickled / "pytorch_model.bin", tmp_path / "ran"
    torch.save({"a": Evil(mark)}, file, _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError, match=r"pytorch_model\.bin, a pickled file that holds more .*posix\.system.*refuses"):
        _load(pickled)
    file.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(UserError, match=r"pytorch_model\.bin, a pickled file .*give the model's safetensors"):
        _load(pickled)
    assert not mark.exists()


CUTS = {"empty": 0.0, "one byte": 1e-9, "a third": 0.33, "nearly whole": 0.999}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_cut_off_is_named(tiny_folder: Path, name: str, cut: str) -> None:
    file = tiny_folder / name
    whole = file.read_bytes()
    length = max(1 if cut == "one byte" else 0, int(CUTS[cut] * len(whole)))
    file.write_bytes(whole[: min(length, len(whole) - 3)])
    what = rf"a damaged weight file \({name}: " if name.endswith("safetensors") else rf"a damaged {name} \("
    with pytest.raises(UserError, match=rf"^the model .* has {what}.*\); fetch it again$") as error:
        _load(tiny_folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    if name == "config.json":
        with pytest.raises(UserError, match=r"damaged config\.json"):
            shape_model(ModelConfig(name=str(tiny_folder)))


@pytest.mark.parametrize("cut", CUTS)
def test_a_pickled_file_that_is_cut_off_is_named(pickled: Path, cut: str) -> None:
    file = pickled / "pytorch_model.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(CUTS[cut] * len(whole))] or (b"" if cut == "empty" else b"P"))
    with pytest.raises(UserError, match=r"^the model .* has .*pytorch_model\.bin.*"):
        _load(pickled)


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b'"x"', b"\xff\xfe\x00", b"{}", b'{"model_type": 3}'])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_json_of_another_form_is_one_sentence(tiny_folder: Path, name: str, content: bytes) -> None:
    (tiny_folder / name).write_bytes(content)
    try:
        _load(tiny_folder)
    except UserError as error:
        assert name in str(error) or "tokenizer" in str(error), error
    else:  # an empty object names nothing, which these two need not
        assert name in ("tokenizer_config.json", "generation_config.json") and content.startswith(b"{")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "32"}, {"num_attention_heads": 0}, {"hidden_size": 0}, {"vocab_size": -1}, {"hidden_act": "no"},
        {"num_hidden_layers": None}, {"hidden_size": 33}, {"rope_parameters": {"rope_type": "no such"}},
        {"torch_dtype": "float99"}, {"eos_token_id": "x"}, {"architectures": 3}, {"model_type": "../x"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_make_no_model_are_one_sentence(tiny_folder: Path, changes: dict[str, Any]) -> None:
    file = tiny_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    for use in (lambda: _load(tiny_folder), lambda: shape_model(ModelConfig(name=str(tiny_folder)))):
        try:
            use()  # some of them change nothing
        except UserError as error:
            assert "\n" not in str(error)


def test_weights_of_other_things(tiny_folder: Path, pickled: Path) -> None:
    file = pickled / "pytorch_model.bin"
    for thing in ([1, 2], torch.zeros(3)):
        torch.save(thing, file)
        with pytest.raises(UserError, match=r"weight file \(pytorch_model\.bin\) that holds .* and no weights"):
            _load(pickled)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(UserError, match=r"a damaged weight file \(pytorch_model\.bin: "):
        _load(pickled)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*git lfs pull"):
        _load(pickled)
    save_file({"a": torch.zeros(1)}, pickled / "model.safetensors")
    (pickled / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match=r"model\.safetensors.*git lfs pull"):
        _load(pickled)


def test_a_folder_without_a_tokenizer(tiny_folder: Path) -> None:
    for file in (*tiny_folder.glob("tokenizer*"), *tiny_folder.glob("special*")):
        file.unlink()
    with pytest.raises(UserError, match=r"has no tokenizer \(.* lacks tokenizer\.json\); fetch it again, whole"):
        _load(tiny_folder)


def test_a_shard_that_is_missing_is_named(tiny_folder: Path, tiny_llama: PreTrainedModel) -> None:
    tiny_llama.save_pretrained(tiny_folder, max_shard_size="40KB")
    (tiny_folder / "model.safetensors").unlink()
    shards = sorted(tiny_folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    _load(tiny_folder)
    shards[1].unlink()
    with pytest.raises(UserError, match=shards[1].name):
        _load(tiny_folder)
