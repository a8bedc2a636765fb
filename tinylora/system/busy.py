"""Do other processes take the cores that our threads need? Measured over a short window; changes nothing.

Two limits are looked at: the cores this process may run on (their lines in /proc/stat), and where a container has a
quota, what the container's own processes use of it. Leaves out: systems other than Linux, time stolen by other virtual
machines, and how the kernel will share the cores: a niced process counts like any other, because at a barrier even a
short turn of it is waited for.
"""

import os
import time
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from tinylora.system.cores import CGROUP, tightest_quota

WINDOW_SECONDS = 0.2
"""How long we look: twenty of the kernel's usual clock ticks on each core."""
ENOUGH = 0.3
"""Cores: below this, what others take is within the noise of so short a look, or too little to matter."""
STAT = Path("/proc/stat")


class Taken(NamedTuple):
    """What other processes take of one limit."""

    others: float
    """Cores' worth of CPU time."""
    cores: float
    """The limit."""

    def missing(self, threads: int) -> float:
        """Of the cores that `threads` threads need under this limit, those that are not free."""
        return max(0.0, min(threads, self.cores) - (self.cores - self.others))


def busy_ticks(text: str, cores: Set[int]) -> int | None:
    """Clock ticks that `cores` have spent in user, nice and system since boot, from the text of /proc/stat.

    None if a core of ours has no line there: some containers renumber them, and then no line can be trusted.
    """
    ticks: dict[int, int] = {}
    for line in text.splitlines():
        name, *counts = line.split() or [""]
        number = name.removeprefix("cpu")
        if name.startswith("cpu") and number.isdigit() and int(number) in cores:  # "cpu" alone is the sum of all
            if len(counts) < 3 or not all(count.isdigit() for count in counts[:3]):
                return None
            ticks[int(number)] = sum(map(int, counts[:3]))
    return sum(ticks.values()) if ticks and set(ticks) == set(cores) else None


def group_seconds(folder: Path) -> float | None:
    """CPU seconds that all processes of a control group have used, of version 2 (cpu.stat) or 1 (cpuacct.usage)."""
    try:
        if (folder / "cpuacct.usage").exists():
            return int((folder / "cpuacct.usage").read_text()) / 1e9
        fields = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
        return int(fields["usage_usec"]) / 1e6
    except (OSError, ValueError, KeyError):
        return None


def measure(seconds: float = WINDOW_SECONDS, stat: Path = STAT, cgroup: Path = CGROUP) -> list[Taken]:
    """What others take now of each limit that this process has, those that the system tells of; blocks for `seconds`.

    Children of this process count as others.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = os.sched_getaffinity(0)
    quota = tightest_quota(cgroup)
    limits = [float(len(cores))] + ([quota[0]] if quota else [])

    def used() -> list[float | None]:
        return [_core_seconds(stat, cores)] + ([group_seconds(quota[1])] if quota else [])

    start, own, before = time.perf_counter(), time.process_time(), used()
    time.sleep(seconds)
    elapsed, own, after = time.perf_counter() - start, time.process_time() - own, used()
    return [
        Taken(min(max((b - a - own) / elapsed, 0.0), limit), limit)
        for limit, a, b in zip(limits, before, after, strict=True)
        if a is not None and b is not None
    ]


def _core_seconds(stat: Path, cores: Set[int]) -> float | None:
    try:
        ticks = busy_ticks(stat.read_text(), cores)
    except (OSError, UnicodeDecodeError):
        return None
    return None if ticks is None else ticks / os.sysconf("SC_CLK_TCK")


def busy_cores(seconds: float = WINDOW_SECONDS) -> float | None:
    """Cores' worth of CPU time that other processes take now, where this process may run; None if that is not known."""
    return max((taken.others for taken in measure(seconds)), default=None)


def warn_if_busy(
    threads: int, say: Callable[[str], None], look: Callable[[], Sequence[Taken]] = measure
) -> float | None:
    """Say one sentence if other processes hold cores that our threads need; returns the cores they take, None: unknown.

    Others that fit on cores which our threads leave free are no competition.
    """
    found = look()
    worst = max(found, key=lambda taken: taken.missing(threads), default=None)
    if worst is not None and worst.missing(threads) > ENOUGH:
        say(_warning(threads, worst))
    return max((taken.others for taken in found), default=None)


def _warning(threads: int, taken: Taken) -> str:
    here = f"{taken.cores:.3g} {'core' if taken.cores == 1 else 'cores'} we may use"
    if threads == 1:
        return (
            f"other processes take {taken.others:.1f} of the {here}, and our thread needs one: everything takes longer "
            "and measured times mean little; wait until they are done"
        )
    fewer = max(1, int(taken.cores - taken.others + ENOUGH))
    return (
        f"other processes take {taken.others:.1f} of the {here}, too many for our {threads} threads: every step of a "
        "computation waits for the thread that is held up (two processes of two threads each on two cores ran ten "
        "times slower than one after the other); wait until they are done, or run all of them with "
        f"OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE and this one with train.num_threads={fewer}"
    )
