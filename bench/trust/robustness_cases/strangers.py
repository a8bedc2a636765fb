# ruff: noqa: E501 (tables of inputs, a line each)
"""Files of strangers: adapters that bring settings, folders that look like runs, names that are code (attack)."""

import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

from bench.trust.robustness_cases.inputs import Skip, Trial, Words, tried

CODE = "```python\nopen('{mark}', 'w')\ndef f(x): return 1\n```"
QUESTION = "00 + 1 ="
PROMPT_TOKENS = len(f"user\n{QUESTION}\nassistant\n") + 3


def metadata_changed(path: Path, old: str, new: str) -> None:
    """Rewrite the settings inside of an adapter file."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    if not re.search(old, metadata["config"]):
        raise OSError(f"the settings hold no {old!r}")
    metadata["config"] = re.sub(old, lambda _: new, metadata["config"], count=1)
    save_file(load_file(path), path, metadata)


def code_that_marks(t: Trial) -> tuple[Path, Path]:
    """(the mark that code of the base would leave, a run on a base that answers with that code)."""
    mark = t.folder / "m"
    reply = CODE.format(mark=mark)
    if len(reply) + PROMPT_TOKENS > 250:
        mark = Path(f"/tmp/robust{os.getpid()}m")
        reply = CODE.format(mark=mark)
    mark.unlink(missing_ok=True)
    model = t.world.parrot(reply, PROMPT_TOKENS)
    rows = [{"question": f"{n:02d} + 1 =", "answer": "x", "tests": [f"assert f({n}) == 1"]} for n in range(40)]
    t.write("code.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    t.recipe(
        model=model,
        task={"path": str(t.folder / "code.jsonl"), "scorer": "exact"},
        generation={"max_new_tokens": len(reply) + 2},
        train={"steps": 1},
    )
    t.done(t.run("train", "t.toml"))
    return mark, t.folder / "runs" / "t-001"


UNSAFE = 'scorer = "python-tests"'
OPTIONS = "[task.scorer_options]\nunsafe_without_namespaces = true"


def unsafe(path: Path) -> None:
    metadata_changed(path, r'scorer = "exact"', UNSAFE)
    metadata_changed(path, r"\[task\.scorer_options\]", OPTIONS)


def not_run(t: Trial, mark: Path, *arguments: str | Path, **more: Any) -> None:
    came = t.run(*arguments, **more)
    t.check(not mark.exists(), f"the code was run: {came.err[-300:]}")
    t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")


@tried("27 sandbox: an adapter file with python-tests and unsafe_without_namespaces, eval FILE", "the code is not run")
def _(t: Trial) -> None:
    mark, run = code_that_marks(t)
    shutil.copy(run / "adapter.safetensors", t.folder / "got.safetensors")
    unsafe(t.folder / "got.safetensors")
    not_run(t, mark, "eval", "got.safetensors", "--num-items", "1")


@tried("27 sandbox: the same file in a folder, as pull leaves it", "the code is not run")
def _(t: Trial) -> None:
    mark, run = code_that_marks(t)
    (t.folder / "got").mkdir()
    shutil.copy(run / "adapter.safetensors", t.folder / "got" / "adapter.safetensors")
    unsafe(t.folder / "got" / "adapter.safetensors")
    not_run(t, mark, "eval", "got", "--num-items", "1")


@tried("27 sandbox: the same file, chat and eval --controls", "the code is not run")
def _(t: Trial) -> None:
    mark, run = code_that_marks(t)
    shutil.copy(run / "adapter.safetensors", t.folder / "got.safetensors")
    unsafe(t.folder / "got.safetensors")
    not_run(t, mark, "eval", "got.safetensors", "--num-items", "1", "--controls", "--out", "e", limit_seconds=400)


def unzipped(t: Trial, run: Path) -> Path:
    """A stranger's folder: a whole run that was made by somebody else, in a home that is not this one."""
    folder = t.folder / "unzipped"
    shutil.copytree(run, folder)
    return folder


ELSEWHERE = ("HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")


def another_home(t: Trial) -> dict[str, str | None]:
    home = t.folder / "another"
    home.mkdir(exist_ok=True)
    return {name: str(home if name == "HOME" else home / name.lower()) for name in ELSEWHERE}


def stranger_runs(verb: str, *arguments: str) -> None:
    @tried(f"27 own: a stranger's folder with config.toml and helper.py, {verb}", "helper.py is not run")
    def _(t: Trial) -> None:
        run = t.trained()
        folder = unzipped(t, run)
        (folder / "config.toml").write_text((folder / "config.toml").read_text().replace("shaped:even", "helper:even"))
        for name in ("adapter.safetensors", "last.safetensors"):
            metadata_changed(folder / name, "shaped:even", "helper:even")
        mark = t.folder / "ran"
        (folder / "helper.py").write_text(f"open({str(mark)!r}, 'w')\n" + t.world.reward())
        shutil.copy(t.folder / "sums.jsonl", folder)
        came = t.run(*arguments, folder=folder, env=another_home(t))
        t.check(not mark.exists(), f"helper.py was run: {came.err[-300:]}")
        t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")


stranger_runs("eval .", "eval", ".", "--num-items", "1")
stranger_runs("eval adapter.safetensors", "eval", "adapter.safetensors", "--num-items", "1")
stranger_runs("train --resume .", "train", "--resume", ".", "--set", "train.steps=3")
stranger_runs("chat .", "chat", ".", "--prompt", "hi", "--max-new-tokens", "4")
stranger_runs("report .", "report", ".")
stranger_runs("inspect --recipe config.toml", "inspect", "adapter.safetensors")
stranger_runs("card .", "card", ".")


@tried("27 own: a run of this user's own, eval", "exit 0; its scorer is used")
def _(t: Trial) -> None:
    run = t.trained()
    t.done(t.run("eval", run, "--num-items", "1"))


@tried("27 own: a run of this user's own that was moved, train --resume", "exit 0, or a sentence that says what to do")
def _(t: Trial) -> None:
    run = t.trained()
    run.rename(t.folder / "runs" / "moved-001")
    came = t.run("train", "--resume", "runs/moved-001", "--set", "train.steps=3")
    t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")


@tried("27 own: trust_remote_code in a stranger's run, a base that brings code", "the base's code is not run")
def _(t: Trial) -> None:
    shutil.copytree(t.world.model("llama"), t.folder / "model")
    t.recipe(model="model", task={"scorer": "number"})
    t.done(t.run("train", "t.toml"))
    mark = t.folder / "ran"
    (t.folder / "model" / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = t.folder / "model" / "config.json"
    settings = json.loads(config.read_text())
    settings["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    settings["model_type"] = "evil"
    config.write_text(json.dumps(settings))
    folder = unzipped(t, t.folder / "runs" / "t-001")
    text = (folder / "config.toml").read_text().replace("trust_remote_code = false", "trust_remote_code = true")
    (folder / "config.toml").write_text(text)
    metadata_changed(folder / "adapter.safetensors", "trust_remote_code = false", "trust_remote_code = true")
    came = t.run("eval", "unzipped", "--num-items", "1", env=another_home(t))
    t.check(not mark.exists(), "the base's code was run")
    t.check(came.code == 2, f"exit code {came.code}: {came.err[-300:]}")


@tried("27 own: task.path of another file in a stranger's adapter, eval --items", "the other file is not read")
def _(t: Trial) -> None:
    run = t.trained(task={"scorer": "number"})
    secret = t.write("secret/key.jsonl", "".join(f'{{"question": "SECRET{n}", "answer": "{n}"}}\n' for n in range(30)))
    shutil.copy(run / "adapter.safetensors", t.folder / "got.safetensors")
    metadata_changed(t.folder / "got.safetensors", r'path = "[^"]*sums.jsonl"', f'path = "{secret}"')
    came = t.run("eval", "got.safetensors", "--num-items", "2", "--items", "out.jsonl", env=another_home(t))
    out = (t.folder / "out.jsonl").read_text() if (t.folder / "out.jsonl").exists() else ""
    t.check("SECRET" not in out + came.out, "the file that the adapter names was read")
    t.check(came.code in (0, 2), f"exit code {came.code}")


@tried("27 sandbox: running code without isolation is said each time", "a line on stderr in train and in eval")
def _(t: Trial) -> None:
    rows = [{"question": f"{n:02d} + 1 =", "answer": "x", "tests": [f"assert f({n}) == 1"]} for n in range(40)]
    t.write("code.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    t.recipe(
        task={"path": "code.jsonl", "scorer": "python-tests", "scorer_options": {"unsafe_without_namespaces": True}}
    )
    for arguments in (("train", "t.toml"), ("eval", "runs/t-001", "--num-items", "1")):
        came = t.done(t.run(*arguments))
        t.says(came, ("without isolation", "not isolated", "unsafe_without_namespaces", "without namespaces"))


@tried("29 sandbox: with unsafe_without_namespaces a child that calls setsid", "it does not outlive the scoring")
def _(t: Trial) -> None:
    import time

    from bench.trust.robustness_cases.children import Child

    code = "import os, time\npid = os.fork()\nif pid == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    code += (
        f"        time.sleep(6)\n        open({str(t.folder / 'alive')!r}, 'w')\n    os._exit(0)\ndef f(x): return x"
    )
    program = (
        "from tinylora import PromptConfig, TaskConfig, build_task\n"
        "t = build_task(TaskConfig(name='jsonl', path='c.jsonl', scorer='python-tests', validation_share=0.0, test_share=0.0,"
        " scorer_options={'unsafe_without_namespaces': True}), PromptConfig())\n"
        f"print(t.score(t.items('train')[0], '```python\\n' + {code!r} + '\\n```'))\n"
    )
    t.write("c.jsonl", '{"question": "a", "answer": "x", "tests": ["assert f(1) == 1"]}\n')
    t.write("program.py", program)
    assert Child
    t.done(t.run(program="program", fresh=True))
    time.sleep(8)
    t.check(not (t.folder / "alive").exists(), "the child is still there")


@tried("29 sandbox: a Python that lives below the temporary folder", "code is scored as elsewhere")
def _(t: Trial) -> None:
    import sys

    if sys.prefix == sys.base_prefix or not Path("/proc/self/ns/user").exists():
        raise Skip("needs a virtual environment and Linux")
    program = (
        "from tinylora import PromptConfig, TaskConfig, build_task\n"
        "t = build_task(TaskConfig(name='jsonl', path='c.jsonl', scorer='python-tests', validation_share=0.0, test_share=0.0),"
        " PromptConfig())\n"
        "print(t.score(t.items('train')[0], '```python\\ndef f(x): return x\\n```')['strict'])\n"
    )
    t.write("c.jsonl", '{"question": "a", "answer": "x", "tests": ["assert f(1) == 1"]}\n')
    t.write("program.py", program)
    plain = t.run(program="program", fresh=True)
    if plain.code == 2 or "namespaces" in plain.err:
        raise Skip("no namespaces here")
    came = t.done(t.run(program="program", fresh=True, env={"TMPDIR": sys.base_prefix}))
    t.check("1.0" in came.out, f"it scores {came.out}")


# --- names that are code, and what reaches a terminal ---

HOSTILE = "evil\"\nlicense: mit\ntags: [pwned]\n---\n'''; import os; os.system('touch pwned') #\x1b[31m\u202e=1+1"


def hostile(t: Trial) -> Path:
    """An adapter file whose base has a hostile name."""
    run = t.folder / "run"
    shutil.copytree(t.world.first_run, run)
    for path in (run / "adapter.safetensors", run / "last.safetensors"):
        metadata_changed(path, r'name = "[^"]*"', f"name = {json.dumps(HOSTILE)}")
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(
        re.sub(r'name = "[^"]*"', lambda _: f"name = {json.dumps(HOSTILE)}", text, count=1)
    )
    return run


for verb in ("card", "decode", "inspect", "report", "encode"):
    for what in ("run", "run/adapter.safetensors"):
        if verb == "report" and "/" in what:
            continue

        @tried(
            f"27 hostile model.name: {verb} {what.split('/')[-1]}",
            "no ESC, no right-to-left mark, no new YAML key, no code",
        )
        def _(t: Trial, verb: str = verb, what: str = what) -> None:
            hostile(t)
            came = t.run(verb, t.folder / what)
            t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")
            for bad in ("\x1b[31m", "\u202e"):
                t.check(bad not in came.out + came.err, f"{bad!r} reaches the terminal")
            lines = came.out.splitlines()
            front = lines[: lines[1:].index("---") + 2] if lines[:1] == ["---"] and "---" in lines[1:] else []
            t.check("license: mit" not in front and "tags: [pwned]" not in front, f"a key of its own: {front}")
            t.check("'''; import os" not in came.out or "```python" not in came.out, "code of its own in the card")
            page = t.folder / "run" / "report.html"
            if verb == "report" and page.exists():
                t.check("\u202e" not in page.read_text(), "a right-to-left mark in the page")


@tried("27 CSV cells that begin with =, + or @", "quoted for spreadsheets")
def _(t: Trial) -> None:
    run = hostile(t)
    for path in (run / "config.toml",):
        text = path.read_text()
        path.write_text(text.replace(json.dumps(HOSTILE), json.dumps("=HYPERLINK(1)")))
    prompt = run / "result.json"
    text = prompt.read_text().replace('"own"', '"=1+1"').replace("'own'", "'=1+1'")
    prompt.write_text(text)
    came = t.run("report", run)
    t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")
    import csv

    for path in (run / "report_files").glob("*.csv"):
        for row in csv.reader(path.open(encoding="utf-8")):
            bad = [cell for cell in row if cell.lstrip()[:1] in ("=", "@") or re.match(r"\+[^0-9.]", cell)]
            t.check(not bad, f"{path.name}: {bad[:2]}")


# --- the kernel cache ---


def kernels(t: Trial) -> Path:
    """A cache of this trial's own with the compiled kernels; Skip where there are none."""
    cache = t.folder / "cache"
    shutil.copytree(os.environ["TINYLORA_CACHE"], cache)
    if not list(cache.glob("kernels/*.so")):
        raise Skip("no kernels were compiled here")
    return cache


def poisoned(t: Trial, cache: Path, mark: Path) -> None:
    """Every library in the cache says so when it is loaded."""
    import subprocess

    source = (
        f'#include <stdio.h>\n__attribute__((constructor)) static void f(void) {{ fclose(fopen("{mark}", "w")); }}\n'
    )
    t.write("p.c", source)
    for library in cache.glob("kernels/*.so"):
        library.unlink()
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, t.folder / "p.c"], check=True, timeout=60)


@tried("27 kernel cache: a library of another user", "it is not loaded")
def _(t: Trial) -> None:
    if os.geteuid() != 0 or shutil.which("cc") is None:
        raise Skip("needs root and a C compiler")
    cache, mark = kernels(t), t.folder / "loaded"
    poisoned(t, cache, mark)
    for path in [cache / "kernels", *cache.glob("kernels/*")]:
        os.chown(path, 65534, 65534)
    (cache / "kernels").chmod(0o777)
    t.recipe()
    came = t.run("train", "t.toml", env={"TINYLORA_CACHE": str(cache)}, limit_seconds=400)
    t.check(not mark.exists(), "the library of another user was loaded")
    t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")


@tried(
    "27 kernel cache: my library in a folder that everyone may write", "it is not loaded, or the folder is closed first"
)
def _(t: Trial) -> None:
    if shutil.which("cc") is None:
        raise Skip("needs a C compiler")
    cache, mark = kernels(t), t.folder / "loaded"
    poisoned(t, cache, mark)
    for library in cache.glob("kernels/*.so"):
        library.chmod(0o777)
    (cache / "kernels").chmod(0o777)
    t.recipe()
    came = t.run("train", "t.toml", env={"TINYLORA_CACHE": str(cache)}, limit_seconds=400)
    t.check(not mark.exists(), "a library that everyone may write was loaded")
    t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")


@tried("27 kernel cache: the mode of its folder", "0700 for what tinylora makes")
def _(t: Trial) -> None:
    folder = Path(os.environ["TINYLORA_CACHE"]) / "kernels"
    if not folder.is_dir():
        raise Skip("no kernels were compiled here")
    mode = stat.S_IMODE(folder.stat().st_mode)
    t.check(mode & 0o077 == 0, f"its mode is {mode:o}")


# --- codes ---


def code_of(t: Trial) -> str:
    return t.done(t.run("encode", t.world.first_run)).out.strip().split()[-1]


def codes(name: str, change: Any, *says: Words, ok: bool = True) -> None:
    @tried(f"29 codes: {name}", "decoded" if ok else "refused in one sentence")
    def _(t: Trial) -> None:
        came = t.run("decode", *change(code_of(t)))
        t.done(came) if ok else t.refused(came, *says)


def in_fours(code: str) -> str:
    head, _, rest = code.partition("-")
    rest = rest.replace("-", "")
    return f"{head} -" + " ".join(rest[i : i + 4] for i in range(0, len(rest), 4))


codes("cut in fours with blanks", lambda code: [in_fours(code)])
codes("cut in fours, each an argument", lambda code: in_fours(code).replace(" -", "-").split())
codes("lower case", lambda code: [code.lower()])
codes("line ends and blanks around", lambda code: [f"\n  {code}\r\n"])
codes("non-breaking blanks", lambda code: [in_fours(code).replace(" -", "-").replace(" ", "\u00a0")])
codes("a letter is wrong", lambda code: [code[:-1] + ("A" if code[-1] != "A" else "B")], ok=False)
codes("cut off", lambda code: [code[: len(code) // 2]], ok=False)
codes("empty behind the mark", lambda code: ["TINY-"], ok=False)
