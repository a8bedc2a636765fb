"""Names of recipes, marks and paths in them, bytes that are no UTF-8 (points 18, 23, 24 and rough)."""

from pathlib import Path

from bench.trust.robustness_cases.inputs import Skip, Trial, Words, tried


def named(name: str) -> None:
    @tried(f"18 names: train {name!r}", "exit 0, and a run's folder")
    def _(t: Trial) -> None:
        path = t.recipe("t.toml")
        target = t.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        t.done(t.run("train", f"./{name}" if name.startswith("-") else name))
        made = list((t.folder / "runs").glob("*/adapter.safetensors"))
        t.check(len(made) == 1, f"{len(made)} runs were made")
        folder = made[0].parent.name
        t.check(folder.isprintable() and "/" not in folder and not folder.startswith("-"), f"the folder is {folder!r}")


for name in (
    "my task.toml", "übung.toml", "日本.toml", "a,b (copy).toml", "deep folder/my task.toml", "UPPER.toml", "v1.2.toml",
    "'quoted'.toml", "-x.toml", "😀.toml", "a\tb.toml", "_.toml",
):  # fmt: skip
    named(name)


@tried("18 names: --name", "the run's folder is called so")
def _(t: Trial) -> None:
    t.recipe("my task.toml")
    t.done(t.run("train", "my task.toml", "--name", "other"))
    t.check((t.folder / "runs" / "other-001").is_dir(), "there is no runs/other-001")


@tried("18 names: --name ../x", "refused; nothing is made outside of runs")
def _(t: Trial) -> None:
    t.recipe()
    t.refused(t.run("train", "t.toml", "--name", "../x"), "name")
    t.check(not list(t.folder.glob("x-*")), "a folder was made outside of runs")


@tried("18 names: two recipes whose names differ in blanks alone", "two runs' folders")
def _(t: Trial) -> None:
    t.recipe("my task.toml")
    t.recipe("my-task.toml")
    t.done(t.run("train", "my task.toml"))
    t.done(t.run("train", "my-task.toml"))
    t.check(len(list((t.folder / "runs").glob("*/adapter.safetensors"))) == 2, "not two runs")


@tried("18 names: 'my task.toml' --dry-run", "exit 0")
def _(t: Trial) -> None:
    t.recipe("my task.toml")
    t.done(t.run("train", "my task.toml", "--dry-run"))


@tried("18 names: a sweep called 'my sweep.toml', --dry-run", "exit 0")
def _(t: Trial) -> None:
    t.recipe()
    t.write("my sweep.toml", 'recipe = "t.toml"\nseeds = [0]\n[[cell]]\nname = "one"\n[evaluate]\nnum_items = 1\n')
    t.done(t.run("sweep", "my sweep.toml", "--dry-run"))


@tried("18 names: --out with a blank: the command it prints", "the path stands in quotes")
def _(t: Trial) -> None:
    t.recipe()
    came = t.done(t.run("train", "t.toml", "--out", "my runs"))
    t.check("'my runs" in came.err or '"my runs' in came.err, f"no quotes: {came.err[-300:]}")


@tried("18 names: --out with a blank: how to go on", "the path stands in quotes")
def _(t: Trial) -> None:
    t.recipe()
    came = t.done(t.run("train", "t.toml", "--out", "my runs"))
    said = [line for line in came.err.splitlines() if "--resume" in line]
    t.check(said and all("--resume '" in line or '--resume "' in line for line in said), f"no quotes: {said}")


# --- 24: marks and other encodings in a recipe ---


def encoded(name: str, encoding: str, mark: bytes, ok: bool, *says: Words) -> None:
    @tried(f"24 recipe: {name}", "exit 0" if ok else "refused in one sentence with the file's name")
    def _(t: Trial) -> None:
        path = t.recipe()
        path.write_bytes(mark + path.read_text().replace("\n", "\r\n").encode(encoding))
        came = t.run("train", "t.toml", "--dry-run")
        t.done(came) if ok else t.refused(came, "t.toml", *says)


encoded("a byte order mark and CRLF", "utf-8", b"\xef\xbb\xbf", True)
encoded("UTF-16 with a mark", "utf-16", b"", False, "UTF-8")
encoded("latin-1", "latin-1", "# Übung\n".encode("latin-1"), False, "UTF-8")
encoded("a NUL in it", "utf-8", b"# \x00\n", False)


@tried("24 sweep: a byte order mark", "exit 0")
def _(t: Trial) -> None:
    t.recipe()
    text = 'recipe = "t.toml"\nseeds = [0]\n[[cell]]\nname = "one"\n[evaluate]\nnum_items = 1\n'
    t.write("s.toml", b"\xef\xbb\xbf" + text.encode())
    t.done(t.run("sweep", "s.toml", "--dry-run"))


def windows(name: str, path: str) -> None:
    @tried(f"24 recipe: {name}", "refused; it says single quotes or forward slashes")
    def _(t: Trial) -> None:
        recipe = t.recipe()
        recipe.write_text(recipe.read_text().replace('"sums.jsonl"', f'"{path}"'))
        t.refused(t.run("train", "t.toml", "--dry-run"), "single quotes", "slash")


windows("a Windows path in double quotes", r"C:\Users\me\sums.jsonl")
windows("a Windows path whose escapes are no TOML", r"C:\data\sums.jsonl")


def broken(name: str, text: str, *says: Words) -> None:
    @tried(f"24 recipe: {name}", f"refused: {', '.join(repr(one) for one in says)}")
    def _(t: Trial) -> None:
        t.recipe()
        t.write("t.toml", text)
        t.refused(t.run("train", "t.toml", "--dry-run"), *says)


broken("a key twice", "[task]\nname = 'jsonl'\nname = 'gsm8k'\n", "t.toml")
broken("a section twice", "[task]\nname = 'jsonl'\n[task]\npath = 'x'\n", "t.toml")
broken("an unknown key", "[task]\nnmae = 'jsonl'\n", "nmae", "name")
broken("NaN as a rate", "[optim]\nlr = nan\n", "lr")
broken("an infinite rate", "[optim]\nlr = inf\n", "lr")
broken("a text for a number", "[optim]\nlr = 'fast'\n", "lr")
broken("true for a number", "[train]\nsteps = true\n", "steps")
broken("a negative seed", "[train]\nseed = -1\n", "seed")
broken("a list for a section", "task = [1]\n", "task")
broken("10,000 brackets", "x = " + "[" * 10_000, "t.toml")
broken("a folder's listing", "total 12\ndrwxr-xr-x 2 root\n", "t.toml")


for key in ("train.seed", "adapter.seed", "task.seed"):

    @tried(f"24 recipe: {key} beyond 64 bits", "exit 0, or refused in one sentence")
    def _(t: Trial, key: str = key) -> None:
        t.recipe()
        came = t.run("train", "t.toml", "--set", f"{key}={10**30}")
        t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")


# --- 23: bytes that are not UTF-8 ---


def bytes_in(name: str, *arguments: str, fresh: bool = True) -> None:
    @tried(f"23 bytes: {name}", "exit 0, or a sentence and exit code 2")
    def _(t: Trial) -> None:
        import shutil

        t.recipe()
        shutil.copytree(t.world.first_run, t.folder / "run")
        came = t.run(*arguments, fresh=fresh, limit_seconds=300)
        t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")


BAD = "caf\udce9"
bytes_in("chat --prompt", "chat", "run", "--prompt", BAD, "--max-new-tokens", "4")
bytes_in("--set", "train", "t.toml", "--dry-run", "--set", f"prompt.system={BAD}", fresh=False)
bytes_in("--set, the key", "train", "t.toml", "--dry-run", "--set", f"{BAD}.x=1", fresh=False)
bytes_in("a recipe's name", "train", f"{BAD}.toml", fresh=False)
bytes_in("--out", "train", "t.toml", "--out", BAD, fresh=False)
bytes_in("decode of a code", "decode", f"TINY-{BAD}", fresh=False)
bytes_in("eval of a folder", "eval", BAD, fresh=False)
bytes_in("inspect of a model", "inspect", BAD, fresh=False)
bytes_in("report --out", "report", "run", "--out", f"{BAD}.html", fresh=False)
bytes_in("settings", "settings", BAD, fresh=False)


@tried("23 bytes: chat reads lines that are not UTF-8", "exit 0, or a sentence and exit code 2")
def _(t: Trial) -> None:
    came = t.run("chat", t.world.first_run, "--max-new-tokens", "4", stdin=b"caf\xe9\nhello\n", fresh=True)
    t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")


@tried("23 bytes: the recipe lies in a folder whose name is no UTF-8", "exit 0, or a sentence and exit code 2")
def _(t: Trial) -> None:
    folder = t.folder / BAD
    try:
        folder.mkdir()
    except (OSError, UnicodeError) as error:
        raise Skip(f"the file system takes no such name ({error})") from error
    t.recipe()
    for name in ("t.toml", "sums.jsonl", "shaped.py"):
        (t.folder / name).rename(folder / name)
    came = t.run("train", "t.toml", folder=Path(folder))
    t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")
