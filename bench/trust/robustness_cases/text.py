"""A terminal that cannot show what is printed: ASCII and latin-1, closed and full outputs (point 19 and smaller)."""

import os
import shutil
from pathlib import Path

from bench.trust.robustness_cases.inputs import Skip, Trial, tried

ENCODINGS = {
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "cp437": {"PYTHONIOENCODING": "cp437"},
}
C_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def japanese(t: Trial) -> None:
    """A task whose questions and answers no ASCII shows, with a final evaluation that prints some."""
    rows = "".join(f'{{"question": "{n} 日本 Ω – é", "answer": "東京{n}"}}\n' for n in range(40))
    t.recipe(task={"path": "ja.jsonl"}, eval={"num_test": 4})
    t.write("ja.jsonl", rows)


for label, environment in ENCODINGS.items():

    @tried(f"19 stdout in {label}: train with a final evaluation", "exit 0; what cannot be shown is escaped")
    def _(t: Trial, environment: dict[str, str] = environment) -> None:
        japanese(t)
        came = t.done(t.run("train", "t.toml", env={**environment}))
        t.says(came, "run folder")

    @tried(f"19 stdout in {label}: chat on 日本", "exit 0")
    def _(t: Trial, environment: dict[str, str] = environment) -> None:
        t.done(t.run("chat", t.world.first_run, "--prompt", "日本 – Ω", "--max-new-tokens", "6", env={**environment}))


@tried("19 stdout in ASCII: train under LC_ALL=C, a fresh interpreter", "exit 0")
def _(t: Trial) -> None:
    japanese(t)
    t.done(t.run("train", "t.toml", env={**C_LOCALE, "PYTHONIOENCODING": None}, fresh=True))


def quiet(name: str, *arguments: str) -> None:
    @tried(f"19 stdout in ASCII: {name}", "exit 0")
    def _(t: Trial) -> None:
        japanese(t)
        shutil.copytree(t.world.first_run, t.folder / "日本")
        t.done(t.run(*arguments, env={"PYTHONIOENCODING": "ascii"}))


quiet("eval", "eval", "日本", "--num-items", "2", "--set", "task.path=ja.jsonl")
quiet("eval --json", "eval", "日本", "--num-items", "2", "--set", "task.path=ja.jsonl", "--json")
quiet("inspect of an adapter", "inspect", "日本")
quiet("decode", "decode", "日本")
quiet("card", "card", "日本")
quiet("report", "report", "日本")
quiet("encode --json", "encode", "日本", "--json")
quiet("settings", "settings")
quiet("recipes", "recipes")
quiet("train --dry-run", "train", "t.toml", "--dry-run")


@tried("19 stdout in ASCII: an error that names 日本", "exit code 2 and a sentence")
def _(t: Trial) -> None:
    t.refused(t.run("train", "日本.toml", env={"PYTHONIOENCODING": "ascii"}))


@tried("19 chat reads 日本 from a pipe in ASCII", "exit 0, or a sentence")
def _(t: Trial) -> None:
    came = t.run(
        "chat", t.world.first_run, "--max-new-tokens", "4", stdin="日本\n".encode(), env={"PYTHONIOENCODING": "ascii"}
    )
    t.check(came.code in (0, 2), f"exit code {came.code}")


@tried("29 chat with a closed stdin", "exit 0, or a sentence and exit code 2")
def _(t: Trial) -> None:
    came = t.run("chat", t.world.first_run, stdin=None, fresh=True)
    t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")


@tried("29 chat with nothing on stdin", "exit 0, or a sentence and exit code 2")
def _(t: Trial) -> None:
    came = t.run("chat", t.world.first_run)
    t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")


def full_device(t: Trial) -> Path:
    """A device of this trial's own on which every write fails for want of room."""
    path = t.folder / "full"
    try:
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 7))
        with path.open("wb", buffering=0) as file:
            file.write(b"x")
    except PermissionError as error:
        raise Skip("no device may be made here") from error
    except OSError:
        pass
    return path


def to_a_full_disk(name: str, *arguments: str) -> None:
    @tried(f"29 stdout is full: {name}", "a sentence about the room, exit code 2")
    def _(t: Trial) -> None:
        t.recipe()
        shutil.copytree(t.world.first_run, t.folder / "run")
        device = full_device(t)
        came = t.run(*arguments, stdout=device, fresh=arguments[0] != "train")
        t.check(came.code == 2, f"exit code {came.code}: {came.err[-300:]}")
        t.check("Traceback" not in came.err and "Exception ignored" not in came.err, f"a traceback: {came.err[-400:]}")


to_a_full_disk("--help", "--help")
to_a_full_disk("train --help", "train", "--help")
to_a_full_disk("--version", "--version")
to_a_full_disk("settings", "settings")
to_a_full_disk("decode --json", "decode", "run", "--json")
