"""What output goes over: pipes, devices, people's files, planted names (attack: devices, temporary names)."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench.trust.robustness_cases.inputs import Skip, Trial, tried

VERBS: dict[str, tuple[str, ...]] = {
    "report --out": ("report", "run", "--out", "TARGET"),
    "eval --items": ("eval", "run", "--num-items", "1", "--items", "TARGET"),
    "eval --untrained": ("eval", "run", "--num-items", "1", "--untrained", "TARGET"),
    "encode -o": ("encode", "run", "-o", "TARGET"),
    "decode -o": ("decode", "run", "-o", "TARGET"),
    "mix -o": ("mix", "run", "run", "-o", "TARGET"),
    "export --to gguf": ("export", "run", "--to", "gguf", "-o", "TARGET"),
    "export --to lora": ("export", "run", "--to", "lora", "-o", "TARGET"),
    "export --to peft": ("export", "run", "--to", "peft", "-o", "TARGET"),
    "figure --out": ("figure", "results.json", "--out", "TARGET"),
}
"""Verbs that write where they are told to."""
FOLDERS = ("export --to lora", "export --to peft")


def ready(t: Trial) -> None:
    shutil.copytree(t.world.first_run, t.folder / "run")
    t.recipe()
    t.write("results.json", "{}")


def command(verb: str, target: str) -> list[str]:
    return [target if one == "TARGET" else one for one in VERBS[verb]]


for verb in VERBS:

    @tried(f"27 over a pipe: {verb}", "refused, and it is still a pipe")
    def _(t: Trial, verb: str = verb) -> None:
        ready(t)
        os.mkfifo(t.folder / "pipe")
        came = t.run(*command(verb, "pipe"), limit_seconds=90)
        t.check(stat.S_ISFIFO((t.folder / "pipe").lstat().st_mode), "the pipe was replaced by a file")
        t.refused(came)


READER = """
import sys
data = open(sys.argv[1], "rb").read()
open(sys.argv[2], "wb").write(data)
"""

for verb in ("report --out", "eval --items", "encode -o", "export --to gguf"):

    @tried(f"27 over a pipe that is read: {verb}", "its reader gets all of it, or it is refused; it is still a pipe")
    def _(t: Trial, verb: str = verb) -> None:
        ready(t)
        os.mkfifo(t.folder / "pipe")
        reader = subprocess.Popen([sys.executable, "-c", READER, t.folder / "pipe", t.folder / "got"])
        try:
            came = t.run(*command(verb, "pipe"), limit_seconds=90)
            if came.code == 0:
                reader.wait(timeout=30)
                t.check((t.folder / "got").stat().st_size > 30, "the reader got nothing")
        finally:
            reader.kill()
            reader.wait(timeout=30)
        t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-200:]}")
        t.check(stat.S_ISFIFO((t.folder / "pipe").lstat().st_mode), "the pipe was replaced by a file")


def device(t: Trial, minor: int) -> Path:
    """A device of this trial's own: 3 is null, 7 is full."""
    path = t.folder / "device"
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
        path.open("wb").close()
    except PermissionError as error:
        raise Skip("no device may be made here") from error
    return path


for verb in ("report --out", "eval --items", "encode -o", "decode -o", "export --to gguf", "mix -o"):
    for name, minor in (("null", 3), ("full", 7)):

        @tried(f"27 over a device like /dev/{name}: {verb}", "written to or refused, and it is still a device")
        def _(t: Trial, verb: str = verb, minor: int = minor) -> None:
            ready(t)
            path = device(t, minor)
            came = t.run(*command(verb, "device"), limit_seconds=90)
            t.check(stat.S_ISCHR(path.lstat().st_mode), "the device was replaced by a file")
            t.check(came.code in ((0, 2) if minor == 3 else (2,)), f"exit code {came.code}: {came.err[-200:]}")

    @tried(f"27 over a link to a device: {verb}", "written to or refused; link and device stay")
    def _(t: Trial, verb: str = verb) -> None:
        ready(t)
        path = device(t, 3)
        (t.folder / "link").symlink_to("device")
        came = t.run(*command(verb, "link"), limit_seconds=90)
        t.check(stat.S_ISCHR(path.lstat().st_mode), "the device was replaced by a file")
        t.check((t.folder / "link").is_symlink(), "the link was replaced by a file")
        t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-200:]}")


for verb in VERBS:
    if verb == "eval --untrained":
        continue  # it reads a file that is there

    @tried(f"27 over my file: {verb}", "refused without --force, and the file stays; it says --force")
    def _(t: Trial, verb: str = verb) -> None:
        ready(t)
        target = t.write("mine.py", "print('mine')\n")
        came = t.run(*command(verb, "mine.py"))
        t.check(target.is_file() and target.read_text() == "print('mine')\n", "my file was overwritten")
        t.refused(came, *([] if verb in (*FOLDERS, "figure --out") else ["--force"]))


for verb in ("report --out", "eval --items", "encode -o", "mix -o", "decode -o"):

    @tried(f"27 over my file with --force: {verb}", "exit 0; the file is the new one")
    def _(t: Trial, verb: str = verb) -> None:
        ready(t)
        target = t.write("old", "old")
        t.done(t.run(*command(verb, "old"), "--force"))
        t.check(target.read_bytes() != b"old", "it is the old one")


@tried("27 over its own page: report, twice", "exit 0 both times")
def _(t: Trial) -> None:
    ready(t)
    t.done(t.run("report", "run"))
    t.done(t.run("report", "run"))


# --- planted names ---


def planted(name: str, plant: Callable[[Path], Path], *arguments: str) -> None:
    """`plant` gets the run's folder and gives the link to make; it leads to a file that must not change."""

    @tried(f"27 planted: {name}", "the file that the link leads to stays as it is")
    def _(t: Trial) -> None:
        ready(t)
        victim = t.write("victim", "precious\n")
        link = plant(t.folder / "run")
        link.parent.mkdir(exist_ok=True)
        if link.is_symlink() or link.exists():
            link.unlink()
        link.symlink_to(victim)
        came = t.run(*arguments)
        t.check(victim.read_text() == "precious\n", "the file behind the link was overwritten")
        t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-200:]}")


planted("report_files/numbers.csv.tmp", lambda run: run / "report_files" / "numbers.csv.tmp", "report", "run")
planted("report_files/numbers.csv", lambda run: run / "report_files" / "numbers.csv", "report", "run")
planted("report.html.tmp", lambda run: run / "report.html.tmp", "report", "run")
planted("report.html", lambda run: run / "report.html", "report", "run")
planted(
    "x.tinylora.tmp beside encode -o", lambda run: run.parent / "x.tinylora.tmp", "encode", "run", "-o", "x.tinylora"
)
planted(
    "items.jsonl.tmp beside eval --items",
    lambda run: run.parent / "items.jsonl.tmp",
    "eval",
    "run",
    "--num-items",
    "1",
    "--items",
    "items.jsonl",
)
planted(
    "config.toml.tmp in a resumed run",
    lambda run: run / "config.toml.tmp",
    "train",
    "--resume",
    "run",
    "--set",
    "train.steps=3",
)
planted(
    "evidence.json.tmp before eval --controls", lambda run: run / "evidence.json.tmp",
    "eval", "run", "--controls", "--num-items", "2", "--text", "sums.jsonl",
)  # fmt: skip
planted(
    "mixed.tinylora.tmp beside mix -o",
    lambda run: run.parent / "mixed.tinylora.tmp",
    "mix",
    "run",
    "run",
    "-o",
    "mixed.tinylora",
)


@tried("27 planted: report_files is a link to a folder with numbers.csv", "that folder's file stays as it is")
def _(t: Trial) -> None:
    ready(t)
    victim = t.write("home/numbers.csv", "precious\n")
    shutil.rmtree(t.folder / "run" / "report_files", ignore_errors=True)
    (t.folder / "run" / "report_files").symlink_to(t.folder / "home")
    came = t.run("report", "run")
    t.check(victim.read_text() == "precious\n", "a file in the folder behind the link was overwritten")
    t.check(came.code in (0, 2), f"exit code {came.code}")


@tried("27 planted: .lock in a run is a link", "the file that the link leads to stays as it is")
def _(t: Trial) -> None:
    ready(t)
    victim = t.write("victim", "precious\n")
    for name in (".lock", ".lock.pid"):
        (t.folder / "run" / name).unlink(missing_ok=True)
        (t.folder / "run" / name).symlink_to(victim)
    came = t.run("train", "--resume", "run", "--set", "train.steps=3")
    t.check(victim.read_text() == "precious\n", "the file behind the link was overwritten")
    t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-200:]}")


@tried("27 over my files: push --dry-run into a folder with my README.md", "refused, or my README.md stays")
def _(t: Trial) -> None:
    ready(t)
    mine = t.write("folder/README.md", "mine")
    came = t.run("push", "run", "me/x", "--dry-run", "folder")
    t.check(mine.read_text() == "mine", "my README.md was overwritten")
    t.check(came.code in (0, 2), f"exit code {came.code}")


@tried("27 over my files: cache --clear where TINYLORA_CACHE is a folder with my files", "my files stay")
def _(t: Trial) -> None:
    mine = t.write("home/thesis.tex", "mine")
    t.write("home/converted/x", "of the cache")
    came = t.run("cache", "--clear", env={"TINYLORA_CACHE": str(t.folder / "home")})
    t.check(mine.exists() and not (t.folder / "home/converted").exists(), f"what is there now: {came.out}")
    t.check(came.code in (0, 2), f"exit code {came.code}")


@tried("27 over a pipe: train --out", "refused, and it is still a pipe")
def _(t: Trial) -> None:
    ready(t)
    os.mkfifo(t.folder / "pipe")
    t.refused(t.run("train", "t.toml", "--out", "pipe", limit_seconds=90))
    t.check(stat.S_ISFIFO((t.folder / "pipe").lstat().st_mode), "the pipe is gone")
