"""How many cores this process may really use: its affinity, cut by the quotas of its control groups."""

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_threads(cgroup: Path = CGROUP) -> int:
    """Cores this process may really use: the smaller of its CPU affinity and its cgroup quota (v1 or v2), at least 1.

    torch counts the machine's cores, so in a container with a quota of 2 on a host of 64 it would start 64 threads.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(cgroup)
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def default_threads() -> int:
    """Threads where nobody names a number: OMP_NUM_THREADS where it is set, but no more than there are cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    cores = available_threads()
    return min(int(asked), cores) if asked.isdecimal() and int(asked) else cores


def _cgroup_quota(root: Path, self_file: Path = Path("/proc/self/cgroup")) -> float | None:
    found = tightest_quota(root, self_file)
    return None if found is None else found[0]


def tightest_quota(root: Path = CGROUP, self_file: Path = Path("/proc/self/cgroup")) -> tuple[float, Path] | None:
    """The tightest quota, in cores, on the way from the root to this process's own cgroup, and the folder that sets it.

    None means unlimited.
    """
    folders = own_cgroups("cpu", root, self_file)
    quotas = [(quota, folder) for folder in folders if (quota := _quota_in(folder)) is not None]
    return min(quotas, key=lambda found: found[0], default=None)


def own_cgroups(controller: str, root: Path = CGROUP, self_file: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """Folders of the control groups on the way from the root to this process's own, of version 2 and of a controller of
    version 1; some may not exist."""
    folders = [root, root / controller]
    try:
        for line in self_file.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            base = root / controller if controller in controllers.split(",") else root
            if controllers and base == root:
                continue
            parts = Path(path.lstrip("/")).parts
            folders += [base.joinpath(*parts[: i + 1]) for i in range(len(parts))]
    except (OSError, ValueError):
        pass  # not Linux, or a kernel without cgroups: the root folders decide
    return folders


def _quota_in(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():  # v2: "MAX PERIOD", where MAX may be the word max
            limit, period = (folder / "cpu.max").read_text().split()
        else:  # v1: a quota of -1 is unlimited
            limit = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return None if limit in ("max", "-1") else int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
