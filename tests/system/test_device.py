"""Device, dtype and thread resolution, with the hardware made up."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tinylora.errors import UserError
from tinylora.system import cores
from tinylora.system import device as d

CPU = torch.device("cpu")


def _hardware(monkeypatch: pytest.MonkeyPatch, *, cuda: bool = False, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, False, "cuda")],
)
def test_auto_takes_cuda_then_mps_then_cpu(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    _hardware(monkeypatch, cuda=cuda, mps=mps)
    assert d.resolve_device("auto").type == expected
    assert d.resolve_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _hardware(monkeypatch)
    with pytest.raises(UserError, match=f"model.device is '{name}'.*available: cpu;"):
        d.resolve_device(name)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="must be one of auto, cpu, cuda, mps, got 'tpu'"):
        d.resolve_device("tpu")
    with pytest.raises(UserError, match="must be one of auto, float32, bfloat16, got 'float16'"):
        d.resolve_dtype("float16", CPU)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512f avx512_bf16", torch.bfloat16),
        ("fpu amx_tile amx_bf16", torch.bfloat16),
        ("fpu avx2 avx512f avx512bw", torch.float32),  # emulated there, and slower than float32
        ("", torch.float32),
    ],
)
def test_auto_dtype_on_a_cpu_follows_its_flags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, expected: torch.dtype
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        f"processor\t: 0\nmodel name\t: some CPU\nflags\t\t: {flags}\nprocessor\t: 1\nflags : amx_bf16\n"
    )
    monkeypatch.delenv(d.ISA_VARIABLE, raising=False)
    found = d.cpu_flags(cpuinfo)
    assert found == frozenset(flags.split())
    monkeypatch.setattr(d, "cpu_flags", lambda: found)
    assert d.resolve_dtype("auto", CPU) == expected
    assert d.resolve_dtype("float32", CPU) == torch.float32
    assert d.resolve_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize(
    ("isa", "left", "expected"),
    [
        ("AVX2", {"avx2"}, torch.float32),
        ("AVX512_CORE", {"avx2", "avx512f"}, torch.float32),
        ("avx512_core_bf16", {"avx2", "avx512f", "avx512_bf16"}, torch.bfloat16),
        ("ALL", {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}, torch.bfloat16),
    ],
)
def test_a_new_processor_counts_as_the_old_one_that_onednn_is_told_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, isa: str, left: set[str], expected: torch.dtype
) -> None:
    (tmp_path / "cpuinfo").write_text("flags : avx2 avx512f avx512_bf16 amx_bf16\n")
    monkeypatch.setenv(d.ISA_VARIABLE, isa)
    found = d.cpu_flags(tmp_path / "cpuinfo")
    assert found == left
    monkeypatch.setattr(d, "cpu_flags", lambda: found)
    assert d.resolve_dtype("auto", CPU) == expected


def test_no_cpuinfo_means_no_flags(tmp_path: Path) -> None:
    assert d.cpu_flags(tmp_path / "none") == frozenset()


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_on_cuda_ignores_emulated_bfloat16(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: torch.dtype
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert d.resolve_dtype("auto", torch.device("cuda")) == expected


def _threads(monkeypatch: pytest.MonkeyPatch, root: Path, affinity: int, own: str = "0::/\n") -> int:
    self_file = root.parent / "self-cgroup"
    self_file.write_text(own)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    quota = cores._cgroup_quota(root, self_file)
    monkeypatch.setattr(cores, "_cgroup_quota", lambda _: quota)
    return cores.available_threads(root)


@pytest.mark.parametrize(
    ("text", "affinity", "expected"),
    [
        ("max 100000", 8, 8),
        ("200000 100000", 8, 2),
        ("150000 100000", 8, 2),
        ("50000 100000", 8, 1),
        ("400000 100000", 2, 2),
    ],
)
def test_threads_under_cgroup_v2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, affinity: int, expected: int
) -> None:
    root = tmp_path / "cgroup"
    root.mkdir()
    (root / "cpu.max").write_text(text + "\n")
    assert _threads(monkeypatch, root, affinity) == expected


def test_the_tightest_quota_on_the_way_to_our_own_cgroup_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = tmp_path / "cgroup"
    inner = root / "slice" / "service"
    inner.mkdir(parents=True)
    (root / "slice" / "cpu.max").write_text("300000 100000\n")
    (inner / "cpu.max").write_text("500000 100000\n")
    assert _threads(monkeypatch, root, 16, "0::/slice/service\n") == 3


@pytest.mark.parametrize(("asked", "expected"), [(None, 4), ("2", 2), ("3,1", 3), ("64", 4), ("0", 4), ("many", 4)])
def test_threads_follow_omp_num_threads(monkeypatch: pytest.MonkeyPatch, asked: str | None, expected: int) -> None:
    monkeypatch.setattr(cores, "available_threads", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert cores.default_threads() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("400000", 4)])
def test_threads_under_cgroup_v1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, expected: int) -> None:
    root = tmp_path / "cgroup"
    (root / "cpu").mkdir(parents=True)
    (root / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
    (root / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert _threads(monkeypatch, root, 8, "4:cpu,cpuacct:/\n") == expected


def test_no_cgroup_leaves_the_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _threads(monkeypatch, tmp_path / "none", 6) == 6


def test_what_float64_is_needed_for_goes_to_the_cpu_where_the_device_has_none(
    elsewhere: Callable[[Tensor], Tensor],
) -> None:
    x = torch.randn(3, 4)
    far = elsewhere(x)
    with pytest.raises(TypeError, match="no float64"):
        far.double()
    assert torch.equal(d.for_float64(far).double(), x.double())


def test_float64_stays_where_it_is_but_for_mps() -> None:
    assert list(d.NO_FLOAT64) == ["mps"]
    x = torch.randn(3)
    assert d.for_float64(x) is x
