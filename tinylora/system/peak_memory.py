"""The most memory that this process, or torch on a GPU, has held."""

import sys
from pathlib import Path

import torch


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
