"""An index of shards points into its own folder: paths and links out of it are not followed."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tinylora.errors import UserError
from tinylora.models.load import load_base_model


@pytest.fixture
def sharded(tiny_folder: Path, tiny_llama: PreTrainedModel) -> Path:
    (tiny_folder / "model.safetensors").unlink()
    tiny_llama.save_pretrained(tiny_folder, max_shard_size="40KB")
    assert len(list(tiny_folder.glob("model-*.safetensors"))) > 1
    return tiny_folder


def _load(folder: Path) -> None:
    load_base_model(str(folder), device="cpu", dtype="float32")


def _first(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def _point(folder: Path, new: str) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    old = _first(folder).name
    content["weight_map"] = {key: new if value == old else value for key, value in content["weight_map"].items()}
    index.write_text(json.dumps(content))


@pytest.mark.parametrize("way", ["../other.safetensors", "ABSOLUTE", "sub/../../other.safetensors", "..\\other", ".."])
def test_a_path_out_of_the_folder_is_not_followed(sharded: Path, tmp_path: Path, way: str) -> None:
    """`../other.safetensors` was loaded as weights."""
    (tmp_path / "other.safetensors").write_bytes(_first(sharded).read_bytes())
    (sharded / "sub").mkdir()
    _point(sharded, str(tmp_path / "other.safetensors") if way == "ABSOLUTE" else way)
    with pytest.raises(UserError, match=r"index\.json of the model .* names .*, which is no file of its folder"):
        _load(sharded)


def test_a_link_out_of_the_folder_is_not_followed_and_the_hubs_own_are(sharded: Path, tmp_path: Path) -> None:
    first = _first(sharded)
    outside = tmp_path / "other.safetensors"
    first.rename(outside)
    first.symlink_to(outside)
    with pytest.raises(UserError, match=r"is a link to .*other\.safetensors, outside of its folder"):
        _load(sharded)
    blobs = tmp_path / "hub" / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    outside.rename(blobs / "0123")
    first.unlink()
    first.symlink_to(blobs / "0123")
    _load(sharded)
    first.unlink()
    (blobs / "0123").rename(sharded / "by-another-name.safetensors")
    first.symlink_to("by-another-name.safetensors")
    _load(sharded)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_one_sentence(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"^the model .*|^model\.safetensors\.index\.json of the model"):
        _load(sharded)
