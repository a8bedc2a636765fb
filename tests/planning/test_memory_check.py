"""A run that cannot fit is refused before anything is loaded; containers' limits from files by hand."""

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from tiny_run import ByteTask, quiet, start, tiny_config

from tinylora.config.method import MethodConfig
from tinylora.config.run import ModelConfig, RunConfig, TrainConfig
from tinylora.errors import UserError
from tinylora.planning import memory_check
from tinylora.planning.memory_check import check_memory
from tinylora.system.memory import DeviceMemory, device_memory
from tinylora.training.train import resume, train

CPU = torch.device("cpu")
BIG = RunConfig(model=ModelConfig(name="Qwen/Qwen2.5-7B-Instruct", device="cpu", dtype="bfloat16"))


def has(monkeypatch: pytest.MonkeyPatch, total: int, available: int) -> None:
    monkeypatch.setattr(memory_check, "device_memory", lambda device: DeviceMemory(total, available))


def test_memory_is_the_machine_s_or_the_container_s_whichever_is_less(tmp_path: Path) -> None:
    machine = psutil.virtual_memory()
    self_file = tmp_path / "self"
    self_file.write_text("0::/a/b\n")
    assert device_memory(CPU, tmp_path, self_file).total == machine.total
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "a" / "memory.max").write_text("max\n")
    (inner / "memory.max").write_text("100000000\n")
    (inner / "memory.current").write_text("70000000\n")
    (inner / "memory.stat").write_text("anon 40000000\nfile 30000000\ninactive_file 20000000\n")
    assert device_memory(CPU, tmp_path, self_file) == DeviceMemory(100_000_000, 50_000_000)


def test_memory_of_a_container_of_cgroups_version_1(tmp_path: Path) -> None:
    self_file = tmp_path / "self"
    self_file.write_text("9:memory:/job\n8:cpu,cpuacct:/job\n")
    job = tmp_path / "memory" / "job"
    job.mkdir(parents=True)
    (job / "memory.limit_in_bytes").write_text("90000000\n")
    (job / "memory.usage_in_bytes").write_text("80000000\n")
    (job / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 30000000\n")
    assert device_memory(CPU, tmp_path, self_file) == DeviceMemory(90_000_000, 40_000_000)
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # no limit, as v1 says it
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("80000000\n")
    (tmp_path / "memory" / "memory.stat").write_text("")
    assert device_memory(CPU, tmp_path, self_file) == DeviceMemory(90_000_000, 40_000_000)


def test_a_run_that_cannot_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 24 * 10**9, 20 * 10**9)
    everything = replace(BIG, method=MethodConfig(name="full"))
    with pytest.raises(UserError, match=r"needs some \d+\.\d GB of memory .* this machine has 24\.0 GB; .* --dry-run"):
        check_memory(everything, quiet)
    said: list[str] = []
    check_memory(everything, said.append, refuse=False)
    check_memory(replace(everything, train=TrainConfig(check_memory=False)), said.append)
    assert len(said) == 2 and all("and 20.0 GB are free" in text for text in said)


def test_what_the_engine_can_do_without_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """15.2 GB of weights: 13 numbers fit into 24 GB, though a packed copy of the weights does not."""
    has(monkeypatch, 24 * 10**9, 20 * 10**9)
    said: list[str] = []
    check_memory(BIG, said.append)
    assert said == []
    has(monkeypatch, 24 * 10**9, 10 * 10**9)
    check_memory(BIG, said.append)
    assert len(said) == 1 and "most of it weights (15.2 GB), and 10.0 GB are free" in said[0]


def test_training_asks_first_and_resuming_only_says_so(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    run = start(tiny_folder, tmp_path / "good", train={"steps": 1}).run
    has(monkeypatch, 1000, 10)
    with pytest.raises(UserError, match="this machine has 1.0 kB"):
        train(tiny_config(tiny_folder), ByteTask(), out=tmp_path / "none", say=quiet)
    assert not (tmp_path / "none").exists()
    said: list[str] = []
    resume(run, ["train.steps=2"], task=ByteTask(), say=said.append)
    assert any("and 10 bytes are free" in text for text in said)
