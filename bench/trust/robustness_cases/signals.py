"""Runs that are interrupted, hung up on, and killed (point 25 and smaller)."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from bench.trust.robustness_cases.inputs import Trial, tried

LONG = {"train": {"steps": 100_000}, "log": {"checkpoint_every": 1}}


def send(numbers: list[int], after: str, apart_seconds: float = 0.05) -> "object":
    """Send signals once stderr holds a text, each a little later than the one before."""

    def meanwhile(pid: int, out: Path, err: Path) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and not (err.is_file() and after in err.read_text(errors="replace")):
            time.sleep(0.02)
        for number in numbers:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
            time.sleep(apart_seconds)

    return meanwhile


def interrupted(
    name: str, numbers: list[int], codes: tuple[int, ...], after: str = "| reward", apart: float = 0.05
) -> None:
    @tried(f"25 signals: {name}", f"exit code {' or '.join(map(str, codes))}, how to go on, and no traceback")
    def _(t: Trial) -> None:
        t.recipe(**LONG)
        came = t.run("train", "t.toml", meanwhile=send(numbers, after, apart), limit_seconds=180, may_fail=True)
        t.check(not came.hung, "no end")
        t.check("Traceback" not in came.err and "Exception ignored" not in came.err, f"a traceback: {came.err[-600:]}")
        t.check(came.code in codes, f"exit code {came.code}: {came.err[-300:]}")
        t.says(came, "--resume")
        if after == "| reward":
            t.done(t.run("train", "--resume", "runs/t-001", "--set", f"train.steps={steps(t) + 1}"), "going on")


def steps(t: Trial) -> int:
    return len((t.folder / "runs" / "t-001" / "metrics.jsonl").read_text().splitlines())


interrupted("Ctrl-C", [signal.SIGINT], (130,))
interrupted("Ctrl-C twice", [signal.SIGINT] * 2, (130,))
interrupted("Ctrl-C twice, at once", [signal.SIGINT] * 2, (130,), apart=0.0)
interrupted("Ctrl-C five times", [signal.SIGINT] * 5, (130,), apart=0.01)
interrupted("SIGTERM", [signal.SIGTERM], (143, 130))
interrupted("SIGHUP", [signal.SIGHUP], (129, 130))
interrupted("SIGTERM, then Ctrl-C", [signal.SIGTERM, signal.SIGINT], (143, 130))


@tried("25 signals: Ctrl-C while the model is loaded", "exit code 130, no traceback")
def _(t: Trial) -> None:
    t.recipe(**LONG)
    meanwhile = send([signal.SIGINT, signal.SIGINT], "", 0.3)
    came = t.run("train", "t.toml", meanwhile=meanwhile, may_fail=True, limit_seconds=120)
    t.check("Traceback" not in came.err, f"a traceback: {came.err[-500:]}")
    t.check(came.code == 130, f"exit code {came.code}")


@tried("25 signals: Ctrl-C twice in a fresh interpreter that is still importing", "exit code 130, no traceback")
def _(t: Trial) -> None:
    t.recipe(**LONG)

    def meanwhile(pid: int, out: Path, err: Path) -> None:
        time.sleep(2.5)
        for _ in range(2):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
            time.sleep(0.1)

    came = t.run("train", "t.toml", meanwhile=meanwhile, fresh=True, may_fail=True, limit_seconds=120)
    t.check("Traceback" not in came.err, f"a traceback: {came.err[-500:]}")
    t.check(came.code == 130, f"exit code {came.code}")


@tried("25 signals: kill -9, then --resume", "the same v as without")
def _(t: Trial) -> None:
    from safetensors.numpy import load_file

    t.recipe(train={"steps": 60})
    t.done(t.run("train", "t.toml"))
    came = t.run("train", "t.toml", meanwhile=send([signal.SIGKILL], "| reward"), may_fail=True)
    t.check(came.code == 137, f"it was not killed in time: exit code {came.code}")
    t.done(t.run("train", "--resume", "runs/t-002"))
    one, two = (load_file(t.folder / "runs" / name / "last.safetensors")["v"].tolist() for name in ("t-001", "t-002"))
    t.check(one == two, f"{one} and {two}")


@tried("25 signals: Ctrl-C twice in chat", "exit code 130 or 0, no traceback")
def _(t: Trial) -> None:
    questions = b"hello\n" * 3000
    came = t.run(
        "chat", t.world.first_run, "--max-new-tokens", "60", stdin=questions, may_fail=True, limit_seconds=120,
        meanwhile=lambda pid, out, err: (time.sleep(4), [os.kill(pid, signal.SIGINT) for _ in range(2)]),
    )  # fmt: skip
    t.check("Traceback" not in came.err, f"a traceback: {came.err[-500:]}")
    t.check(came.code in (0, 130), f"exit code {came.code}")


@tried("25 signals: SIGTERM in eval", "exit code 143 or 130, no traceback")
def _(t: Trial) -> None:
    run = t.trained()
    meanwhile = send([signal.SIGTERM, signal.SIGTERM], "untrained", 0.1)
    came = t.run(
        "eval", run, "--num-items", "10", "--samples", "400", meanwhile=meanwhile, may_fail=True, limit_seconds=120
    )
    t.check("Traceback" not in came.err, f"a traceback: {came.err[-500:]}")
    t.check(came.code in (0, 130, 143), f"exit code {came.code}")
