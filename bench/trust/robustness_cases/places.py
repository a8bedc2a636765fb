# ruff: noqa: E501 (tables of inputs, a line each)
"""Places that cannot be written or read: read-only, a loop of links, too long a name, no device (point 20 and rough)."""

import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from bench.trust.robustness_cases.inputs import Skip, Trial, Words, tried

Place = Callable[[Trial], Path]


def read_only(t: Trial) -> Path:
    """A file system that nobody may write to, with the tiny recipe in it; it is unmounted with the trial's child."""
    folder = t.folder / "ro"
    folder.mkdir()
    t.recipe()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=777", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, timeout=30).returncode:
        raise Skip("no file system may be mounted here")
    for name in ("t.toml", "sums.jsonl", "shaped.py"):
        shutil.copy(t.folder / name, folder)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True, timeout=30, capture_output=True)
    return folder


def unmount(t: Trial) -> None:
    subprocess.run(["umount", "-l", str(t.folder / "ro")], capture_output=True, timeout=30)


def loop(t: Trial) -> Path:
    (t.folder / "a").symlink_to("b")
    (t.folder / "b").symlink_to("a")
    return t.folder / "a"


def too_long(t: Trial) -> Path:
    return t.folder / ("n" * 300)


def a_file(t: Trial) -> Path:
    return t.write("file", "")


def nowhere(t: Trial) -> Path:
    return Path("/proc/nowhere")


def deep_file(t: Trial) -> Path:
    return t.write("file", "") / "below"


PLACES: dict[str, Place] = {
    "read-only": read_only, "a loop of links": loop, "a name of 300 characters": too_long, "/proc": nowhere, "below a file": deep_file,
}  # fmt: skip


def writes(verb: str, place: str, *arguments: str) -> None:
    """PLACE in the arguments is the place, RUN a finished run."""

    @tried(f"20 places: {verb} to {place}", "exit code 2 and one sentence with the place")
    def _(t: Trial) -> None:
        shutil.copytree(t.world.first_run, t.folder / "run")
        t.recipe()
        try:
            path = PLACES[place](t)
            target = path / "x" if place == "read-only" else path
            came = t.run(*(str(target) if one == "PLACE" else one for one in arguments))
            t.refused(came, (path.name[:40], str(path)[:40]))
        finally:
            unmount(t)


for place in PLACES:
    writes("train --out", place, "train", "t.toml", "--out", "PLACE")
    writes("export --to lora", place, "export", "run", "--to", "lora", "-o", "PLACE")
for place in ("read-only", "a loop of links", "a name of 300 characters"):
    writes("encode -o", place, "encode", "run", "-o", "PLACE")
    writes("decode -o", place, "decode", "run", "-o", "PLACE")
    writes("report --out", place, "report", "run", "--out", "PLACE")
    writes("eval --items", place, "eval", "run", "--num-items", "1", "--items", "PLACE")
writes("mix -o", "read-only", "mix", "run", "run", "-o", "PLACE")
writes("export --to gguf", "read-only", "export", "run", "--to", "gguf", "-o", "PLACE")
writes("export --to merged", "read-only", "export", "run", "--to", "merged", "-o", "PLACE")
writes("push --dry-run", "read-only", "push", "run", "me/x", "--dry-run", "PLACE")
writes("eval --untrained", "read-only", "eval", "run", "--num-items", "1", "--untrained", "PLACE")
writes("eval --controls --out", "read-only", "eval", "run", "--controls", "--out", "PLACE", "--num-items", "1")
for place in ("a loop of links", "below a file"):
    writes("eval --controls --out", place, "eval", "run", "--controls", "--out", "PLACE", "--num-items", "1")


@tried("20 places: train in a read-only folder", "exit code 2 and one sentence")
def _(t: Trial) -> None:
    try:
        t.refused(t.run("train", "t.toml", folder=read_only(t)), ("read-only", "cannot write"))
    finally:
        unmount(t)


@tried("20 places: --resume of a run on a read-only file system", "exit code 2 and one sentence")
def _(t: Trial) -> None:
    try:
        folder = read_only(t)
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True, timeout=30, capture_output=True)
        shutil.copytree(t.world.first_run, folder / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True, timeout=30, capture_output=True)
        came = t.run("train", "--resume", folder / "run", "--set", "train.steps=3")
        t.refused(came, ("read-only", "writ", "own"))
    finally:
        unmount(t)


def reads(name: str, make: Place, *says: Words) -> None:
    @tried(f"20 places: task.path is {name}", "exit code 2 and one sentence")
    def _(t: Trial) -> None:
        path = make(t)
        t.recipe(task={"path": str(path)})
        t.refused(t.run("train", "t.toml", "--dry-run", limit_seconds=60), (path.name[:40], str(path)), *says)


def a_socket(t: Trial) -> Path:
    path = Path(os.path.relpath(t.folder / "s"))
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        try:
            os.chdir(t.folder)
            made.bind("s")
        finally:
            os.chdir(here)
    return t.folder / path.name


def a_pipe(t: Trial) -> Path:
    os.mkfifo(t.folder / "pipe")
    return t.folder / "pipe"


reads("a loop of links", loop)
reads("a name of 300 characters", too_long)
reads("/proc/self/mem (EIO)", lambda t: Path("/proc/self/mem"))
reads("a socket", a_socket)
reads("a pipe that nobody writes to", a_pipe)
reads("/dev/zero", lambda t: Path("/dev/zero"))
reads("/dev/urandom", lambda t: Path("/dev/urandom"))
reads("a dangling link", lambda t: (t.folder / "gone").symlink_to("nowhere") or t.folder / "gone")  # type: ignore[func-returns-value]


def loop_of_toml(t: Trial) -> Path:
    (t.folder / "a.toml").symlink_to("b")
    (t.folder / "b").symlink_to("a.toml")
    return t.folder / "a.toml"


def pipe_of_toml(t: Trial) -> Path:
    return a_pipe(t).rename(t.folder / "p.toml")


def as_recipe(name: str, make: Place) -> None:
    @tried(f"20 places: the recipe is {name}", "exit code 2 and one sentence")
    def _(t: Trial) -> None:
        t.refused(t.run("train", make(t), "--dry-run", limit_seconds=60))


as_recipe("a loop of links", loop_of_toml)
as_recipe("a name of 300 characters", lambda t: t.folder / ("n" * 300 + ".toml"))
as_recipe("a pipe that nobody writes to", pipe_of_toml)


@tried("20 places: /dev/zero as --text", "exit code 2 and one sentence")
def _(t: Trial) -> None:
    run = t.trained()
    came = t.run(
        "eval", run, "--controls", "--num-items", "1", "--text", "/dev/zero", limit_seconds=90, memory_bytes=12 * 2**30
    )
    t.refused(came, "/dev/zero", within_gb=4)


def cache(name: str, make: Place, *arguments: str) -> None:
    @tried(f"26 cache: {name}", "exit code 2; the sentence names TINYLORA_CACHE")
    def _(t: Trial) -> None:
        t.recipe(model=t.world.gguf("good.gguf"))
        try:
            place = make(t)
            t.refused(
                t.run(*arguments, env={"TINYLORA_CACHE": str(place / "c" if place.is_dir() else place)}),
                "TINYLORA_CACHE",
            )
        finally:
            unmount(t)


cache("a file", a_file, "train", "t.toml")
cache("a loop of links", loop, "train", "t.toml")
cache("read-only", read_only, "train", "t.toml")
cache("/proc", nowhere, "train", "t.toml")


@tried("26 cache: `cache` with a file in its place", "exit code 2, or said; no traceback")
def _(t: Trial) -> None:
    came = t.run("cache", env={"TINYLORA_CACHE": str(a_file(t))})
    t.check(came.code in (0, 2), f"exit code {came.code}")


@tried("26 cache: it is full (no room for the unpacked model)", "exit code 2 and a sentence")
def _(t: Trial) -> None:
    folder = t.folder / "ro"
    folder.mkdir()
    t.recipe(model=t.world.gguf("good.gguf"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, timeout=30).returncode:
        raise Skip("no file system may be mounted here")
    try:
        came = t.run("train", "t.toml", env={"TINYLORA_CACHE": str(folder)})
        t.refused(came, ("room", "full"), "TINYLORA_CACHE")
    finally:
        unmount(t)


for name, make in {"a file": a_file, "a loop of links": loop, "read-only": read_only, "/proc": nowhere}.items():

    @tried(f"26 data folder (TINYLORA_DATA): {name}", "exit 0 and said, or exit code 2 and a sentence with its name")
    def _(t: Trial, make: Place = make) -> None:
        t.recipe()
        try:
            came = t.run("train", "t.toml", env={"TINYLORA_DATA": str(make(t))})
            t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")
            t.says(came, "TINYLORA_DATA")
        finally:
            unmount(t)
