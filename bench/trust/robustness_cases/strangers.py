# ruff: noqa: E501 (tables of inputs, a line each)
"""Files of strangers: adapters that bring settings, folders that look like runs, names that are code (attack)."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from bench.trust.robustness_cases.inputs import Skip, Trial, tried

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
        mark = Path(tempfile.gettempdir(), f"robust{os.getpid()}m")  # a shorter one: the reply has to fit
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
    code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    code += f"        open({str(t.folder / 'pid')!r}, 'w').write(str(os.getpid()))\n        time.sleep(300)\n"
    code += "    os._exit(0)\ntime.sleep(0.5)\ndef f(x): return x"
    program = (
        "from tinylora import PromptConfig, TaskConfig, build_task\n"
        "t = build_task(TaskConfig(name='jsonl', path='c.jsonl', scorer='python-tests', validation_share=0.0,"
        " test_share=0.0, scorer_options={'unsafe_without_namespaces': True, 'timeout_seconds': 2}), PromptConfig())\n"
        f"print(t.score(t.items('train')[0], '```python\\n' + {code!r} + '\\n```'))\n"
    )
    t.write("c.jsonl", '{"question": "a", "answer": "x", "tests": ["assert f(1) == 1"]}\n')
    t.write("program.py", program)
    t.done(t.run(program="program", fresh=True))
    pid = (t.folder / "pid").read_text()
    state = Path(f"/proc/{pid}/stat")
    t.check(not state.exists() or ") Z " in state.read_text(), "the child is still there")


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
