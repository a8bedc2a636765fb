"""Files of two kilobytes whose settings ask for gigabytes: refused before a number of them is made."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import tiny_config
from transformers import PreTrainedModel

from tinylora.adapter.attach import attach
from tinylora.adapter.config import AdapterConfig
from tinylora.config.method import MethodConfig
from tinylora.config.run import RunConfig
from tinylora.config.schema import dump_config
from tinylora.errors import UserError
from tinylora.methods.build import put_method_on
from tinylora.methods.put_on import put_on
from tinylora.store.adapter import open_adapter

CHILD = """
import resource, sys
from tinylora.errors import UserError
from tinylora.methods.put_on import put_on
from tinylora.models.load import load_base_model
from tinylora.store.adapter import open_adapter
model = load_base_model(sys.argv[1], device="cpu", dtype="float32").model
resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**30, 3 * 2**30))
for file in sys.argv[2:]:
    try:
        put_on(model, open_adapter(file))
    except UserError as error:
        print("REFUSED", " ".join(str(error).split()))
    else:
        print("PUT ON")
"""


def _file(path: Path, settings: str, shape: tuple[int, int] = (1, 1)) -> Path:
    """An adapter file with settings that need not be those of its numbers."""
    save_file({"v": torch.full(shape, 0.1)}, path, {"format": "tinylora-vector-1", "config": settings, "facts": "{}"})
    return path


def test_what_the_settings_of_a_file_ask_for_is_held_against_its_numbers(
    tiny_folder: Path, tmp_path: Path, fresh_cache: Path
) -> None:
    """`adapter.u = 3000000` made `verify` pass six gigabytes, of P, before it looked at v."""
    asked = {
        "[adapter]\nu = 3000000": "adapter.u = 3000000 and rank 2 give every map 12,000,000 numbers of P",
        "[adapter]\nu = 30000": "its v has 1 numbers a tie group, and its settings (adapter.u = 30,000) make 30,000",
        "[adapter]\nrank = 1000000": "give every map 1,000,000,000,000 numbers of P",
        '[method]\nname = "lora-xs"\nrank = 20000': "its settings (method.rank = 20,000) make 400,000,000",
        '[method]\nname = "lora"\nrank = 10000000': "holds 1 numbers, and lora of rank 10000000 has",
        '[method]\nname = "vera"\nrank = 100000000': "holds 1 numbers, and vera of rank 100000000 has",
        '[method]\nname = "adapter"\nrank = 100000000': "holds 1 numbers, and adapter layers of width 100000000 has",
        '[method]\nname = "full"': "holds 1 numbers, and full fine-tuning has",
    }
    files = [_file(tmp_path / f"{i}.safetensors", settings) for i, settings in enumerate(asked)]
    command = [sys.executable, "-c", CHILD, str(tiny_folder), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout.splitlines()
    assert len(told) == len(asked)
    for line, sentence in zip(told, asked.values(), strict=True):
        assert line.startswith("REFUSED") and sentence in line, line


@pytest.mark.parametrize("name", ["tinylora", "lora-xs", "lora", "dora", "vera", "ia3", "adapter", "full"])
def test_the_numbers_of_every_method_fit_its_own_settings(
    tiny_llama: PreTrainedModel, tmp_path: Path, fresh_cache: Path, name: Any
) -> None:
    config = RunConfig(method=MethodConfig(name=name, rank=2), adapter=AdapterConfig(u=3))
    adapter = put_method_on(tiny_llama, config.method, config.adapter)
    shape = adapter.shape
    adapter.detach()
    opened = open_adapter(_file(tmp_path / "a.safetensors", dump_config(config), shape))
    assert put_on(tiny_llama, opened).num_trained == shape[0] * shape[1]


def test_a_run_is_refused_before_p_is_made(tiny_folder: Path) -> None:
    """u = 10^7 met the OOM killer. The bound is that of the portable file, so that each run can have one."""
    config = tiny_config(tiny_folder)
    with pytest.raises(UserError, match=r"40,000,000 numbers of P; at most 131,072 are allowed"):
        replace(config, adapter=replace(config.adapter, u=10**7))
    with pytest.raises(UserError, match="at most 131,072 are allowed"):
        replace(config, adapter=replace(config.adapter, u=32, rank=65))
    replace(config, adapter=replace(config.adapter, u=32768))
    replace(config, adapter=replace(config.adapter, u=32, rank=64))
    replace(config, method=MethodConfig(name="lora-xs", rank=30))  # its P is another one


def test_all_trained_numbers_together_are_bounded_as_in_a_file(tiny_llama: PreTrainedModel) -> None:
    """Else a run ends at its very end, when its portable file is written."""
    with pytest.raises(UserError, match=r"21 tie groups of u = 1,000,000 are 21,000,000 trained numbers"):
        attach(tiny_llama, AdapterConfig(rank=1, u=10**6, tying="none"), projections=lambda *_: pytest.fail("made"))
    with pytest.raises(UserError, match=r"P of 21 modules .* takes .* and this machine has"):
        attach(tiny_llama, AdapterConfig(rank=16, u=2**19, tying="all"), projections=lambda *_: pytest.fail("made"))
