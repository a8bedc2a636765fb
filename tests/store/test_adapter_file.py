"""The file with the trained numbers: exact both ways, and every other file refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tinylora.config.run import EvalConfig, RunConfig
from tinylora.errors import UserError
from tinylora.store.adapter_file import BEST, load_vector, save_vector
from tinylora.tasks.config import PromptConfig

CONFIG = RunConfig(
    prompt=PromptConfig(system='a "quoted"\nline', pattern=r"(\d+) \\ =", few_shot=({"question": "ü", "answer": "1"},)),
    eval=EvalConfig(prompts=({"name": "plain", "template": "{question}"},)),
    reward={"strict": 0.1, "value_only": -0.25},
)


def test_v_and_settings_come_back_exactly(tmp_path: Path) -> None:
    v = torch.randn(13, 1, generator=torch.Generator().manual_seed(0))
    path = tmp_path / BEST
    save_vector(path, v.requires_grad_(True), CONFIG, {"step": 3})
    for place in (path, tmp_path):  # a run folder holds its adapter
        back, config = load_vector(place)
        assert torch.equal(back, v)
        assert config == CONFIG
    np.testing.assert_array_equal(load_file(path)["v"], v.detach().numpy())
    assert [p.name for p in tmp_path.iterdir()] == [BEST]


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no adapter \(looked for adapter\.safetensors\)"):
        load_vector(tmp_path)
    other = tmp_path / "other.safetensors"
    save_file({"v": np.zeros((1, 1), np.float32)}, other, {"format": "pt"})
    with pytest.raises(UserError, match=r"is no tinylora adapter \(format 'pt'\)"):
        load_vector(other)
    save_vector(tmp_path / BEST, torch.zeros(2, 1), CONFIG)
    data = (tmp_path / BEST).read_bytes()
    (tmp_path / BEST).write_bytes(data[:-3])
    with pytest.raises(UserError, match="is damaged"):
        load_vector(tmp_path)
