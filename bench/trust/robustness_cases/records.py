# ruff: noqa: E501 (tables of inputs, a line each)
"""Runs whose files were changed: settings, results, tests, checkpoints, bases (point 8, data loss, lies, smaller)."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from bench.trust.robustness_cases.inputs import Trial, Words, tried

MORE = ("--set", "train.steps=3")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    if old not in text:
        raise OSError(f"{path.name} holds no {old!r}")
    path.write_text(text.replace(old, new, 1))


def resumed_after(name: str, right: str, change: Any, *says: Words, ok: bool = False, **sections: Any) -> None:
    """A finished run is changed and resumed for one step more."""

    @tried(name, right)
    def _(t: Trial) -> None:
        run = t.trained(**sections)
        metrics = (run / "metrics.jsonl").read_bytes()
        change(t, run)
        came = t.run("train", "--resume", "runs/t-001", *MORE)
        if ok:
            t.done(came)
            return
        t.refused(came, *says)
        if (run / "metrics.jsonl").exists():
            t.check((run / "metrics.jsonl").read_bytes() == metrics, "metrics.jsonl was cut")


# --- data loss ---


def no_checkpoints(t: Trial, run: Path) -> None:
    for path in (run / "checkpoint").iterdir():
        path.unlink()


resumed_after(
    "28 data loss: rm RUN/checkpoint/*, then --resume", "refused; metrics.jsonl stays", no_checkpoints, "checkpoint"
)
resumed_after(
    "28 data loss: rm -r RUN/checkpoint, then --resume",
    "refused; metrics.jsonl stays",
    lambda t, run: shutil.rmtree(run / "checkpoint"),
    "checkpoint",
)
resumed_after(
    "28 data loss: checkpoints of 0 bytes", "refused; metrics.jsonl stays",
    lambda t, run: [path.write_bytes(b"") for path in (run / "checkpoint").iterdir()], "checkpoint",
)  # fmt: skip
resumed_after(
    "28 data loss: one bit of each checkpoint", "refused; metrics.jsonl stays",
    lambda t, run: [path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])) for path in (run / "checkpoint").iterdir()],
    "checkpoint",
)  # fmt: skip
resumed_after(
    "28 data loss: metrics.jsonl is gone", "refused", lambda t, run: (run / "metrics.jsonl").unlink(), "metrics.jsonl"
)
resumed_after(
    "28 data loss: the newest checkpoint alone is damaged",
    "it goes on from the one before",
    lambda t, run: max((run / "checkpoint").iterdir()).write_bytes(b"x"),
    ok=True,
)
resumed_after("28 nothing is changed", "it goes on", lambda t, run: None, ok=True)


@tried("28 data loss: a run stopped before its first checkpoint", "it starts again at step 1")
def _(t: Trial) -> None:
    run = t.trained()
    no_checkpoints(t, run)
    for name in ("metrics.jsonl", "samples.jsonl", "adapter.safetensors", "last.safetensors", "adapter.tinylora"):
        (run / name).unlink()
    t.done(t.run("train", "--resume", "runs/t-001"))


# --- lies about settings ---

for key, old, new in (
    ("optim.lr", "lr = 0.05", "lr = 0.5"), ("train.seed", "seed = 0\nmicro", "seed = 7\nmicro"), ("adapter.n_tie", "n_tie = 8", "n_tie = 4"),
    ("adapter.seed", 'basis = "svd"\nseed = 0', 'basis = "svd"\nseed = 3'), ("generation.temperature", "temperature = 1.0", "temperature = 0.5"),
    ("prompt.template", 'template = "{question}"', 'template = "Q: {question}"'), ("grpo.group_size", "group_size = 2", "group_size = 4"),
    ("reward", "value_only = 1.0", "strict = 1.0"), ("optim.beta1", "beta1 = 0.9\n", "beta1 = 0.5\n"), ("grpo.kl_coef", "kl_coef = 0.0", "kl_coef = 0.1"),
):  # fmt: skip
    resumed_after(
        f"28 lies: {key} edited in config.toml, then --resume",
        "refused",
        lambda t, run, old=old, new=new: edit(run / "config.toml", old, new),
        "config.toml",
    )
resumed_after(
    "28 no lie: train.steps edited in config.toml, then --resume", "it goes on",
    lambda t, run: edit(run / "config.toml", "steps = 2", "steps = 4"), ok=True,
)  # fmt: skip


def environment(t: Trial, run: Path) -> None:
    (run / "environment.json").unlink()


resumed_after("29 environment.json is missing, then --resume", "it goes on", environment, ok=True)
resumed_after(
    "29 environment.json is broken, then --resume",
    "it goes on",
    lambda t, run: (run / "environment.json").write_text('{"a'),
    ok=True,
)
resumed_after(
    "29 environment.json holds a list, then --resume",
    "it goes on",
    lambda t, run: (run / "environment.json").write_text("[1]"),
    ok=True,
)
resumed_after(
    "29 environment.json holds other types, then --resume",
    "it goes on",
    lambda t, run: (run / "environment.json").write_text('{"packages": 7, "torch": null}'),
    ok=True,
)


@tried("29 the scorer's file is changed, then --resume", "refused, or said")
def _(t: Trial) -> None:
    t.trained()
    edit(t.folder / "shaped.py", "% 2 == 0", "% 3 == 0")
    came = t.run("train", "--resume", "runs/t-001", *MORE)
    t.check(came.code in (0, 2), f"exit code {came.code}")
    t.says(came, ("scorer", "shaped"))


# --- 8: what a scorer reads beside the answer ---

ROWS = [
    {"question": f"Write f of {n}.", "answer": "x", "tests": [f"assert f({n}) == {n + 1}"], "setup": "y = 1"}
    for n in range(30)
]


def beside(name: str, change: Any, scorer: str = "python-tests", **options: Any) -> None:
    def prepared(t: Trial) -> None:
        t.write("code.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
        t.write(
            "level.py", 'def f(item, text):\n    return min(1.0, item["metadata"]["level"] / 10) * (len(text) % 2)\n'
        )
        t.recipe(task={"path": "code.jsonl", "scorer": scorer, "scorer_options": options})

    def changed(t: Trial) -> None:
        t.write("code.jsonl", "".join(json.dumps(change(dict(row))) + "\n" for row in ROWS))

    @tried(f"08 beside the answer: {name}, then --resume", "refused: other questions")
    def _(t: Trial) -> None:
        prepared(t)
        t.done(t.run("train", "t.toml"))
        changed(t)
        t.refused(t.run("train", "--resume", "runs/t-001", *MORE), ("questions", "task"))

    @tried(f"08 beside the answer: {name}, then --untrained", "refused: replies to something else")
    def _(t: Trial) -> None:
        prepared(t)
        t.done(t.run("train", "t.toml"))
        t.done(t.run("eval", "runs/t-001", "--num-items", "2", "--untrained", "u.jsonl"))
        changed(t)
        t.refused(
            t.run("eval", "runs/t-001", "--num-items", "2", "--untrained", "u.jsonl"), ("u.jsonl", "else", "other")
        )


for row in ROWS:
    row["level"] = 3  # type: ignore[assignment]
beside(
    "tests",
    lambda row: {**row, "tests": [test.replace("== ", "== 1 + ") for test in row["tests"]]},
    unsafe_without_namespaces=True,
)
beside("setup", lambda row: {**row, "setup": "y = 2"}, unsafe_without_namespaces=True)
beside("metadata of a Python scorer", lambda row: {**row, "level": 9}, scorer="level:f")


# --- lies about results ---


def finished(t: Trial) -> Path:
    run = t.folder / "run"
    shutil.copytree(t.world.first_run, run)
    return run


def result_says(name: str, change: Any) -> None:
    for verb in ("report", "card"):

        @tried(f"28 lies: {name} edited in result.json, then {verb}", "refused, or computed from the items")
        def _(t: Trial, verb: str = verb) -> None:
            run = finished(t)
            result = json.loads((run / "result.json").read_text())
            change(result)
            (run / "result.json").write_text(json.dumps(result))
            came = t.run(verb, run)
            t.check(came.code in (0, 2), f"exit code {came.code}")
            page = (run / "report.html").read_text() if (run / "report.html").exists() and came.code == 0 else ""
            for lie in ("99.0", "0.000123", "1.23e-04", "Trained by magic", "777"):
                t.check(lie not in page + came.out, f"{lie!r} is printed")


def verdict(result: dict[str, Any]) -> None:
    result["verdict"] = "Trained by magic: +99.0 points"


def p_value(result: dict[str, Any]) -> None:
    result["primary"].update(p_value=0.000123, difference=0.99, text="0.0 -> 99.0 % (+99.0 points; p = 0.000123)")


def random_controls(result: dict[str, Any]) -> None:
    result["random"] = [{"correct": 777, "total": 2, "length": 1.0}]


result_says("the verdict", verdict)
result_says("p and the difference", p_value)
result_says("a random control", random_controls)


@tried("28 lies: result_items.jsonl edited (a reply made right), then report", "refused, or not shown as right")
def _(t: Trial) -> None:
    run = finished(t)
    edit(run / "result_items.jsonl", '"strict": 0.0', '"strict": 1.0')
    came = t.run("report", run)
    t.check(came.code in (0, 2), f"exit code {came.code}")


@tried("28 lies: one weight of the base is changed, size and time kept, then verify", "refused: another base")
def _(t: Trial) -> None:
    shutil.copytree(t.world.model("llama"), t.folder / "model")
    t.recipe(model="model")
    t.done(t.run("train", "t.toml"))
    t.done(t.run("verify", "runs/t-001"))
    path = t.folder / "model" / "model.safetensors"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x80  # a sign: what bf16 would round away is no other base
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    t.refused(t.run("verify", "runs/t-001"), ("differ", "not the base", "another", "other"))


for score in ("NaN", "7", "-1", "true", '"1.0"', "null"):

    @tried(f"29 --untrained: {score} as a score", "refused")
    def _(t: Trial, score: str = score) -> None:
        run = t.trained()
        t.done(t.run("eval", run, "--num-items", "2", "--untrained", "u.jsonl"))
        text = (t.folder / "u.jsonl").read_text()
        import re

        t.write("u.jsonl", re.sub(r'"strict": [0-9.]+', f'"strict": {score}', text, count=1))
        t.refused(t.run("eval", run, "--num-items", "2", "--untrained", "u.jsonl"), "u.jsonl")


@tried("29 --untrained: a row is missing", "refused, or answered again")
def _(t: Trial) -> None:
    run = t.trained()
    t.done(t.run("eval", run, "--num-items", "3", "--untrained", "u.jsonl"))
    t.write("u.jsonl", "".join((t.folder / "u.jsonl").read_text().splitlines(keepends=True)[:-1]))
    t.refused(t.run("eval", run, "--num-items", "3", "--untrained", "u.jsonl"), "u.jsonl")
