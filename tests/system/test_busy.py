"""The guard for busy machines: what others take, read from made-up files and once from a real busy process."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tinylora.system import busy
from tinylora.system.busy import Taken, busy_cores, busy_ticks, group_seconds, measure, warn_if_busy

STAT = """\
cpu  900 90 9 5000 70 0 8 30 0 0
cpu0 100 20 3 1000 10 0 1 5 0 0
cpu1 200 30 4 2000 20 0 2 6 0 0
cpu10 1000 0 0 7 0 0 0 0 0 0
cpu11 5 6 7 0 0 0 0 0 0 0
intr 8284419 0 0
ctxt 12073401
"""


@pytest.mark.parametrize(
    ("cores", "expected"),
    [({0}, 123), ({1}, 234), ({0, 1}, 357), ({10}, 1000), ({11}, 18), ({0, 11}, 141)],
)
def test_ticks_are_user_nice_and_system_of_our_cores(cores: set[int], expected: int) -> None:
    assert busy_ticks(STAT, cores) == expected


@pytest.mark.parametrize(
    ("text", "cores"),
    [(STAT, {0, 2}), (STAT, set()), ("", {0}), ("cpu 1 2 3\n", {0}), ("cpu0 1 2\n", {0}), ("cpu0 a b c d\n", {0})],
)
def test_a_file_that_does_not_tell_of_all_our_cores_is_not_guessed_at(text: str, cores: set[int]) -> None:
    assert busy_ticks(text, cores) is None


def test_seconds_of_a_control_group_of_either_version(tmp_path: Path) -> None:
    (tmp_path / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\nsystem_usec 2\n")
    assert group_seconds(tmp_path) == 2.5
    (tmp_path / "cpuacct.usage").write_text("1500000000\n")  # version 1, whose cpu.stat holds other things
    assert group_seconds(tmp_path) == 1.5
    assert group_seconds(tmp_path / "missing") is None


# --- a made-up machine ---


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Taken]]:
    """measure() on 4 cores over one second in which all processes take `total` seconds, and this one `own` of them."""
    stat, clock, own_clock = tmp_path / "stat", [0.0], [0.0]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "process_time", lambda: own_clock[0])

    def run(total: float, own: float, group: float | None = None, quota: float | None = None) -> list[Taken]:
        if group is not None and quota is not None:
            (tmp_path / "cpu.stat").write_text("usage_usec 7000000\n")
            monkeypatch.setattr(busy, "tightest_quota", lambda _: (quota, tmp_path))
        else:
            monkeypatch.setattr(busy, "tightest_quota", lambda _: None)

        def write(seconds: float) -> None:  # split over the cores and the three kinds
            ticks = round(100 * seconds)
            stat.write_text(f"cpu0 {ticks} 0 0 9\ncpu1 0 7 0 9\ncpu2 0 0 7 9\ncpu3 0 0 0 9\n")

        def sleep(seconds: float) -> None:
            clock[0] += seconds
            own_clock[0] += own * seconds
            write(50 + total * seconds)
            if group is not None:
                (tmp_path / "cpu.stat").write_text(f"usage_usec {7000000 + round(1e6 * group * seconds)}\n")

        monkeypatch.setattr(time, "sleep", sleep)
        write(50)
        return measure(1.0, stat, tmp_path)

    return run


def test_what_others_take_is_all_but_our_own(machine: Callable[..., list[Taken]]) -> None:
    (taken,) = machine(total=2.5, own=1.0)
    assert taken == Taken(pytest.approx(1.5), 4.0)
    assert machine(total=0.1, own=0.2)[0].others == 0.0  # the kernel's ticks are coarse
    assert machine(total=9.0, own=0.0)[0].others == 4.0


def test_a_containers_quota_is_looked_at_too(machine: Callable[..., list[Taken]]) -> None:
    host, container = machine(total=3.0, own=0.5, group=1.5, quota=2.0)
    assert host == Taken(pytest.approx(2.5), 4.0)
    assert container == Taken(pytest.approx(1.0), 2.0)


def test_nothing_is_known_without_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "tightest_quota", lambda _: None)
    assert measure(0.0, tmp_path / "stat", tmp_path) == []
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert measure(0.0) == [] and busy_cores(0.0) is None
    assert warn_if_busy(2, pytest.fail) is None


# --- when it warns ---


@pytest.mark.parametrize(
    ("threads", "found", "missing"),
    [
        (2, Taken(1.0, 2), 1.0),
        (1, Taken(1.0, 2), 0.0),  # the other core is free
        (2, Taken(2.0, 8), 0.0),
        (8, Taken(2.0, 8), 2.0),
        (16, Taken(0.0, 8), 0.0),  # too many threads are another mistake
        (1, Taken(2.0, 2), 1.0),
    ],
)
def test_missing_cores(threads: int, found: Taken, missing: float) -> None:
    assert found.missing(threads) == pytest.approx(missing)


def test_one_sentence_with_the_number_and_what_to_do() -> None:
    said: list[str] = []
    assert warn_if_busy(2, said.append, lambda: [Taken(1.04, 2)]) == 1.04
    (sentence,) = said
    assert "take 1.0 of the 2 cores" in sentence and "our 2 threads" in sentence
    assert "OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE" in sentence and "train.num_threads=1" in sentence
    assert "wait until they are done" in sentence and "\n" not in sentence


def test_one_thread_is_not_told_to_take_fewer() -> None:
    said: list[str] = []
    warn_if_busy(1, said.append, lambda: [Taken(2.0, 2)])
    assert "take 2.0 of the 2 cores" in said[0] and "num_threads" not in said[0]


def test_the_tighter_limit_decides() -> None:
    said: list[str] = []
    others = warn_if_busy(2, said.append, lambda: [Taken(30.0, 64), Taken(1.5, 2)])
    assert others == 30.0 and "take 1.5 of the 2 cores" in said[0]
    said.clear()
    warn_if_busy(2, said.append, lambda: [Taken(30.0, 64), Taken(0.1, 2)])
    assert not said


@pytest.mark.parametrize("found", [[], [Taken(0.2, 2)], [Taken(1.2, 4)]])
def test_quiet_where_there_is_room(found: list[Taken]) -> None:
    warn_if_busy(2, pytest.fail, lambda: found)


# --- a real machine ---


@pytest.mark.skipif(not busy.STAT.exists(), reason="only Linux tells")
def test_a_busy_process_is_counted() -> None:
    """What this asserts cannot fail from other load: the child's own CPU time over the window is a lower bound on what
    others take, but for the kernel's ticks (one a core at each end) and what the clock moves between the readings."""
    code = "print(flush=True)\nwhile True: pass"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()  # it is running
        cores = len(os.sched_getaffinity(0))
        before, start = _cpu_seconds(child.pid), time.perf_counter()
        (taken, *_) = measure(1.0)
        after, elapsed = _cpu_seconds(child.pid), time.perf_counter() - start
        tolerance = 0.15 + 2 * cores / os.sysconf("SC_CLK_TCK")
        assert taken.others >= (after - before) / elapsed - tolerance
        assert taken.cores == cores and taken.others <= cores
    finally:
        child.kill()
        child.communicate(timeout=60)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
