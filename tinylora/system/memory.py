"""How much memory a device has for us, containers included: what a run's estimate is held against."""

import sys
from pathlib import Path
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]
import torch

from tinylora.system.cores import CGROUP, own_cgroups


class DeviceMemory(NamedTuple):
    """Bytes."""

    total: int
    """Of the machine, of the container's limit if that is less, or of the GPU."""
    available: int
    """What nobody holds now; files that the system has cached count as available."""


def device_memory(
    device: torch.device, root: Path = CGROUP, self_file: Path = Path("/proc/self/cgroup")
) -> DeviceMemory:
    """Memory of a device; main memory for all but CUDA."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(total, free)
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for folder in own_cgroups("memory", root, self_file):
        found = _limit_in(folder)
        if found is not None:
            total, available = min(total, found.total), min(available, found.available)
    return DeviceMemory(total, available)


def _limit_in(folder: Path) -> DeviceMemory | None:
    names = ("memory.max", "memory.current", "inactive_file ")
    if not (folder / names[0]).exists():
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
    try:
        limit = (folder / names[0]).read_text().strip()
        if limit == "max":
            return None
        used = int((folder / names[1]).read_text())
        stat = (folder / "memory.stat").read_text().splitlines()
        cached = sum(int(line.split()[1]) for line in stat if line.startswith(names[2]))
        return DeviceMemory(int(limit), max(0, int(limit) - used + cached))
    except (OSError, ValueError, IndexError):
        return None


def reset_peak_memory(device: torch.device) -> None:
    """Let the peak start from what is held now, where the system can do that (Linux, CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux, or not allowed: the peak is then that since the process began


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on a GPU, else the most of main memory that the process held."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass  # not Linux
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
