"""Sweeps: what is refused before anything runs, the choice by validation, real children that fail and are killed."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from scipy import stats
from typer.testing import CliRunner

from tinylora.cli import app
from tinylora.cli.sweep import next_time
from tinylora.config.recipe import load_recipe
from tinylora.config.schema import dump_config
from tinylora.errors import UserError
from tinylora.sweeps import driver as driver_module
from tinylora.sweeps import talk as talk_module
from tinylora.sweeps.driver import Driver, kind_of, left_in_words, seconds_left
from tinylora.sweeps.plan import check_same, load_sweep
from tinylora.sweeps.state import RunState, choose, read_state, untrained_key, validation
from tinylora.system.progress import Bar

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "recipes" / "sweeps").glob("*.toml"))


def tinylora_(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


def sweep_file(folder: Path, **changes: Any) -> Path:
    """A sweep over demo with one cell, changed; None leaves a key out."""
    table: dict[str, Any] = {"recipe": "demo", "cell": [{"name": "a"}], **changes}
    path = folder / "sweep.toml"
    path.write_text(tomli_w.dumps({key: value for key, value in table.items() if value is not None}))
    return path


# --- what comes along ---


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweeps_that_come_along_load_by_name_and_give_every_training_as_many_samples(path: Path) -> None:
    assert path.read_text().startswith("# ")
    result = tinylora_("sweep", path.stem, "--dry-run", "--json", "--out", "/nonexistent/sweep")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)["plan"]
    assert len({row["samples"] for row in plan}) == 1


def test_the_dial_has_the_sizes_and_methods_that_it_promises() -> None:
    sweep = load_sweep(ROOT / "recipes" / "sweeps" / "dial-small.toml")
    cells = [(cell, sweep.config(cell.candidates()[0])) for cell in sweep.cells]
    for algorithm in ("grpo", "sft"):
        own = [(cell, config) for cell, config in cells if config.train.algorithm == algorithm]
        assert {c.method.name for _, c in own} == {"tinylora", "lora-xs", "lora", "adapter", "full"}
        assert {c.method.rank for _, c in own if c.method.name == "lora"} == {1, 32}
        assert all(len(cell.seeds) == (3 if c.method.name == "tinylora" else 1) for cell, c in own)
        tiny = [c.adapter for _, c in own if c.method.name == "tinylora"]
        assert {(a.tying, a.n_tie, a.num_groups, a.u) for a in tiny} == {
            ("tiled", 17, 0, 1),
            ("all", 17, 0, 13),
            ("all", 17, 0, 1),
            ("none", 17, 0, 1),
            ("tiled", 5, 0, 1),
            ("tiled", 17, 4, 1),
        }
    order = [config.train.algorithm for _, config in cells]
    assert order == sorted(order)  # RL before SFT


# --- what is refused, in one sentence, before anything runs ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipes": "demo"}, "unknown key 'recipes', did you mean 'recipe'?"),
        ({"recipe": 3}, "recipe must name a recipe"),
        ({"recipe": "demoo"}, "no recipe is named 'demoo', did you mean 'demo'?"),
        ({"cell": []}, "at least one [[cell]]"),
        ({"cell": [{}]}, "cell 1 needs a name"),
        ({"cell": [{"name": "a/b"}]}, "the name of cell 1 must be letters, digits"),
        ({"cell": [{"name": "a" * 300}]}, "the name of cell 1 must have at most 100 characters"),
        ({"cell": [{"name": "a"}, {"name": "b"}, {"name": "A"}]}, "two cells are named 'A'"),
        ({"cell": [{"name": "a", "sed": [1]}]}, "cell 'a': unknown key 'sed', did you mean 'seeds'?"),
        ({"cell": [{"name": "a", "set": ["optim.lrr=1"]}]}, "cell 'a': unknown key 'lrr' in section [optim]"),
        ({"cell": [{"name": "a", "set": ["method.rank='x'"]}]}, "cell 'a': recipe key method.rank must be a whole"),
        ({"cell": [{"name": "a", "set": ["grpo.group_size=1"]}]}, "cell 'a': grpo.group_size must be at least 2"),
        ({"set": "train.steps=3"}, "set must be a list of settings"),
        ({"set": ["train.seed=3"]}, "train.seed stands in set, but a sweep sets it by seeds"),
        ({"set": ["eval.num_test=3"]}, "a sweep sets it by evaluate.num_items"),
        ({"seeds": []}, "seeds must be a list of whole numbers, 0 or more, with at least one in it, got []"),
        ({"seeds": [0, True]}, "seeds must be a list of whole numbers"),
        ({"seeds": [1, 1]}, "seeds has a number twice"),
        ({"projection_seeds": [-1]}, "projection_seeds must be a list of whole numbers"),
        ({"evaluate": {"num_items": 0}}, "evaluate.num_items must be a whole number"),
        ({"evaluate": {"items": 5}}, "unknown key 'items' in [evaluate], did you mean 'num_items'?"),
        ({"choose": {"optim.lr": []}}, "choose optim.lr must be a list of values with at least one in it"),
        ({"choose": {"optim.lr": 0.1}}, "choose optim.lr must be a list of values"),
        ({"choose": {"optim.lr": [0.1, 0.1]}}, "choose optim.lr has a value twice"),
        ({"choose": {"optim.rate": [0.1]}}, "cell 'a': unknown key 'rate' in section [optim]"),
        ({"choose": {"optim.lr": ["high"]}}, "cell 'a': recipe key optim.lr must be a number"),
        ({"choose": {"train.seed": [1]}}, "train.seed stands in choose"),
        ({"choose": {"reward.value_only": [0.0, 1.0]}}, "choose reward.value_only: its values would be judged by"),
        ({"choose": {"task.test_share": [0.1, 0.2]}}, "choose task.test_share: its values would be judged by"),
        ({"choose": {"optim.lr": [0.1], "seed": "x"}}, "choose.seed must be a whole number"),
        ({"choose": {"prompt.system": ["a" * 300, "b"]}}, "characters, of 200 at most; make two cells of it"),
    ],
)
def test_refused_before_anything_runs(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    result = tinylora_("sweep", str(sweep_file(tmp_path, **changes)), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_refused_options(tmp_path: Path) -> None:
    path = str(sweep_file(tmp_path))
    assert "--jobs must be at least 1" in tinylora_("sweep", path, "--jobs", "-1").stderr
    assert "--until must be a time of day" in tinylora_("sweep", path, "--until", "25:00").stderr
    assert "no sweep is named 'dial'" in tinylora_("sweep", "dial").stderr
    assert "does not exist" in tinylora_("sweep", "dial.toml").stderr


def test_a_cell_takes_from_the_sweep_what_it_does_not_say(tmp_path: Path) -> None:
    cells = [
        {"name": "a"},
        {"name": "b", "seeds": [7], "projection_seeds": [8, 9], "choose": {"optim.lr": [0.3]}},
        {"name": "c", "choose": {}},
    ]
    path = sweep_file(tmp_path, cell=cells, seeds=[0, 1], choose={"optim": {"lr": [0.1, 0.2]}, "seed": 5})
    a, b, c = load_sweep(path).cells
    assert (a.seeds, a.projection_seeds, dict(a.choose), a.choose_seed) == ((0, 1), (0,), {"optim.lr": (0.1, 0.2)}, 5)
    assert (b.seeds, b.projection_seeds, dict(b.choose), b.choose_seed) == ((7,), (8, 9), {"optim.lr": (0.3,)}, 5)
    assert not c.choose and [run.chosen for run in c.candidates()] == [()]
    # the candidates' seed 5 is none of theirs, so no candidate is one of the runs that count
    assert [cell.num_trainings() for cell in (a, b, c)] == [2 + 2, 1 + 2, 2]
    assert {run.path for run in b.runs((("optim.lr", 0.3),))} == {
        "cells/b/seed-7_projection-8_lr-0.3", "cells/b/seed-7_projection-9_lr-0.3",
    }  # fmt: skip


def test_the_copy_in_the_folder_is_the_same_sweep_and_another_one_is_refused(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path, seeds=[0, 1], choose={"optim.lr": [0.1, 0.2]}))
    folder = tmp_path / "out"
    assert not check_same(sweep, folder)
    folder.mkdir()
    (folder / "demo.toml").write_text(sweep.recipe_text())
    (folder / "sweep.toml").write_text(sweep.text())
    assert check_same(sweep, folder)
    (folder / "cells" / "a" / "seed-0").mkdir(parents=True)
    (folder / "cells" / "a" / "seed-0" / "items.jsonl").touch()  # one run is evaluated
    for changes, says in (
        ({"seeds": [0, 2]}, "seeds of cell 'a' ([0, 1] there, [0, 2] here)"),
        ({"set": ["train.steps=3"]}, "train.steps (40 there, 3 here)"),
        ({"choose": {"optim.lr": [0.1]}}, "choose of cell 'a' ({\"optim.lr\": [0.1, 0.2]} there"),
        ({"evaluate": {"num_items": 7}}, "evaluate.num_items (1000 there, 7 here)"),
        ({"cell": [{"name": "a"}, {"name": "b"}]}, "cell 'b' (only here)"),
    ):
        table = {"seeds": [0, 1], "choose": {"optim.lr": [0.1, 0.2]}, **changes}
        with pytest.raises(UserError, match="holds another sweep, which differs in") as error:
            check_same(load_sweep(sweep_file(tmp_path, **table)), folder)
        assert says in str(error.value)


def test_the_number_of_test_items_may_change_before_anything_is_evaluated(tmp_path: Path) -> None:
    late, out = datetime(2020, 1, 1), tmp_path / "out"
    Driver(load_sweep(sweep_file(tmp_path)), out, jobs=1, threads=1, command=[], say=print, until=late).run()
    fewer, said = load_sweep(sweep_file(tmp_path, evaluate={"num_items": 7})), list[str]()
    Driver(fewer, out, jobs=1, threads=1, command=[], say=said.append, until=late).run()
    assert said[0] == "7 test items from now on (1000 before; nothing is evaluated yet)"
    assert load_sweep(out / "sweep.toml").num_items == 7
    (out / "cells" / "a" / "seed-0_projection-0").mkdir(parents=True)
    (out / "cells" / "a" / "seed-0_projection-0" / "items.jsonl").touch()
    assert check_same(fewer, out)
    with pytest.raises(UserError, match=r"evaluate.num_items \(7 there, 1000 here\)"):
        check_same(load_sweep(sweep_file(tmp_path)), out)


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    result = tinylora_("sweep", str(sweep_file(tmp_path)), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2 and "is not empty and holds no sweep" in result.stderr


# --- pure parts ---


def test_until_is_the_next_time_it_is_that_late() -> None:
    now = datetime(2026, 5, 1, 22, 30)
    assert next_time("23:15", now) == datetime(2026, 5, 1, 23, 15)
    assert next_time("7:05", now) == datetime(2026, 5, 2, 7, 5)


def test_time_left_says_what_it_does_not_know() -> None:
    assert left_in_words({}, {"a": 3}, 1) == "time left unknown (3 jobs, none of their kind has ended yet)"
    assert left_in_words({"a": [50.0, 70.0]}, {"a": 4}, 2) == "about 2 min left"
    assert "and unknown for 2 jobs" in left_in_words({"a": [60.0]}, {"a": 1, "b": 2}, 1)
    assert seconds_left({"a": [50.0, 70.0]}, {"a": 4, "b": 2, "c": 0}, 2) == (120.0, 2)
    assert left_in_words({"a": [60.0]}, {"a": 0}, 1) == "nothing left"
    lora = load_recipe("demo", ["method.name='lora'"])
    assert kind_of(lora) != kind_of(load_recipe("demo")) != kind_of(load_recipe("demo", ["train.steps=41"]))


def fake_run(folder: Path, lr: float, validation_reward: list[float], keep: str = "best") -> RunState:
    """A trained run as the folder has it, with a validation score at each step."""
    run = folder / "demo-001"
    run.mkdir(parents=True)
    (run / "config.toml").write_text(dump_config(load_recipe("demo", [f"optim.lr={lr}", f"train.keep='{keep}'"])))
    (run / "adapter.safetensors").write_bytes(b"")
    rows = [
        {"step": step, "validation_reward": one, "validation_strict": one / 2, "validation_value_only": one / 4}
        for step, one in enumerate(validation_reward)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "state.json").write_text(json.dumps({"trained": True}))
    return read_state(folder)


def test_validation_chooses_and_the_test_does_not(tmp_path: Path) -> None:
    (cell,) = load_sweep(sweep_file(tmp_path, choose={"optim.lr": [0.1, 0.2, 0.3]})).cells
    candidates = cell.candidates()
    # Step 0 is the untrained model, here better than all. What was best in between counts: that is what a run keeps.
    scores = [[0.9, 0.2, 0.1], [0.9, 0.1, 0.5], [0.9, 0.5, 0.2]]
    states = [fake_run(tmp_path / run.path, 0.1, one) for run, one in zip(candidates, scores, strict=True)]
    for state, right in zip(states, (1.0, 0.0, 0.0), strict=True):  # on the test the first would win
        (state.folder / "items.jsonl").write_text(json.dumps({"condition": "adapter", "strict": right}) + "\n")
    chosen, rows = choose(candidates, states)
    assert chosen == (("optim.lr", 0.2),)  # of equals the first
    assert [row["validation"]["reward"] for row in rows] == [0.2, 0.5, 0.5]
    assert rows[1]["validation"] == {"step": 2, "reward": 0.5, "strict": 0.25, "value_only": 0.125}
    failed = [RunState(folder=tmp_path, run=None) for _ in states]
    assert choose(candidates, [states[0], *failed[1:]])[0] == (("optim.lr", 0.1),)
    assert choose(candidates, failed)[0] is None


def test_a_cell_is_labelled_by_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sweep_file(tmp_path, choose={"method.name": ["lora", "dora"], "method.rank": [1, 32]})
    sweep, out = load_sweep(path), tmp_path / "out"
    driver = Driver(sweep, out, jobs=1, threads=1, command=[], say=print)
    (cell,) = sweep.cells
    assert driver.time_left() == "time left unknown (5 jobs, none of their kind has ended yet)"
    for number, run in enumerate(cell.candidates()):
        fake_run(out / run.path, 0.1, [0.0, 0.1 * number])
    driver = Driver(sweep, out, jobs=1, threads=1, command=[], say=print)
    driver.look()
    bar = Bar("sweep", 0, "jobs", timed=False)
    monkeypatch.setattr(Bar, "is_on", True)
    driver._show(bar)
    assert bar.count() == "4/5 jobs" and math.isnan(bar.seconds_left())  # it has never been evaluated
    (told,) = driver.results.gather(driver.states, {"a": driver.standing(cell)})["cells"]
    assert told["chosen"] == {"method.name": "dora", "method.rank": 32}
    assert (told["method"], told["label"]) == ("dora", "dora of rank 32")
    plan = json.loads(tinylora_("sweep", str(path), "--out", str(out), "--dry-run", "--json").stdout)["plan"]
    assert plan[0]["method"] == "dora"


def test_a_candidate_that_is_tried_again_does_not_take_the_results_away(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path, choose={"optim.lr": [0.1, 0.2]}))
    (cell,) = sweep.cells
    good, bad = cell.candidates()
    fake_run(tmp_path / good.path, 0.1, [0.0, 0.5])
    (tmp_path / good.path / "items.jsonl").write_text("{}\n")
    (tmp_path / good.path / "state.json").write_text(json.dumps({"trained": True, "evaluated": True}))
    (tmp_path / bad.path).mkdir(parents=True)
    failed = {"stage": "training", "code": 1, "lines": ["no"]}
    (tmp_path / bad.path / "state.json").write_text(json.dumps({"failed": failed}))
    driver = Driver(sweep, tmp_path, jobs=1, threads=1, command=[], say=print)
    driver.look()
    assert [job.run.path for job in driver._jobs()] == [bad.path]
    assert driver.choices["a"][0] is None  # it may be the better one
    assert driver.standing(cell)[0] == (("optim.lr", 0.1),)
    (tmp_path / good.path / "items.jsonl").unlink()  # nothing was evaluated: then nothing stands
    driver = Driver(sweep, tmp_path, jobs=1, threads=1, command=[], say=print)
    driver.look()
    assert driver.standing(cell)[0] is None


@pytest.mark.parametrize(
    ("name", "becomes"), [("my recipe", "my-recipe"), ("sweep", "sweep-recipe"), (".x", "x"), ("a-0.5b", "a-0.5b")]
)
def test_a_recipe_may_have_any_name(tmp_path: Path, name: str, becomes: str) -> None:
    (tmp_path / f"{name}.toml").write_text(dump_config(load_recipe("demo")))
    path = tmp_path / "grid.toml"
    path.write_text(tomli_w.dumps({"recipe": f"{name}.toml", "cell": [{"name": "a"}]}))
    sweep = load_sweep(path)
    assert sweep.name == becomes
    Driver(sweep, tmp_path / "out", jobs=1, threads=1, command=[], say=print, until=datetime(2020, 1, 1)).run()
    assert check_same(sweep, tmp_path / "out")


def test_validation_of_the_last_numbers_where_those_are_kept(tmp_path: Path) -> None:
    state = fake_run(tmp_path / "a", 0.1, [0.0, 0.7, 0.3], keep="last")
    assert state.run is not None
    assert validation(state.run) == {"step": 2, "reward": 0.3, "strict": 0.15, "value_only": 0.075}


def test_untrained_replies_are_shared_by_what_decides_them() -> None:
    demo = load_recipe("demo")
    same = ["adapter.seed=3", "train.seed=4", "optim.lr=1.0", "method.name='lora'", "train.steps=2"]
    assert all(untrained_key(load_recipe("demo", [one]), 5) == untrained_key(demo, 5) for one in same)
    other = ["task.seed=3", "prompt.system='x'", "generation.max_new_tokens=9", "model.name='other'"]
    keys = {untrained_key(load_recipe("demo", [one]), 5) for one in other}
    assert len(keys | {untrained_key(demo, 5), untrained_key(demo, 6)}) == 6


# --- with real children ---


@pytest.fixture
def tiny_recipe(tiny_folder: Path, fresh_cache: Path, tmp_path: Path) -> Path:
    """A recipe that trains in an instant: bytes out of a random model; value-only is right where some have even codes,
    strict where the reply stops."""
    file = tmp_path / "letters.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i} of {i}?", "answer": "even"}) + "\n" for i in range(80)))
    share = "sum(ord(c) % 2 == 0 for c in text) / max(1, len(text))"
    (tmp_path / "evens.py").write_text(
        "def score(item, text):\n"
        f"    share = {share}\n"
        "    return {'strict': 1.0, 'value_only': float(share > 0.1), 'share': share}\n"
    )
    path = tmp_path / "tiny.toml"
    table = {
        "model": {"name": str(tiny_folder), "device": "cpu", "dtype": "float32"},
        "adapter": {"n_tie": 8, "u": 2},
        "task": {"name": "jsonl", "path": str(file), "scorer": "evens:score"},
        "reward": {"share": 1.0},
        "generation": {"max_new_tokens": 16},
        "grpo": {"prompts_per_step": 2, "group_size": 2, "truncated": "keep", "refill_factor": 1.0},
        "optim": {"lr": 0.5},
        "train": {"steps": 3},
        "eval": {"every": 1, "num_validation": 4},
    }
    path.write_text(tomli_w.dumps(table))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "out"
    yield folder


def drive(path: Path, folder: Path, *args: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tinylora", "sweep", str(path), "--out", str(folder), *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=path.parent)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


@pytest.mark.slow
def test_a_sweep_end_to_end(tiny_recipe: Path, out: Path, tmp_path: Path) -> None:
    """Three seeds, a choice, a cell that fails: results.json says what the files of items say, by other code."""
    path = sweep_file(
        tmp_path, recipe=str(tiny_recipe), evaluate={"num_items": 12},
        cell=[
            {"name": "two", "seeds": [0, 1], "choose": {"optim.lr": [0.5, 5.0], "seed": 0}},
            {"name": "broken", "set": ["adapter.targets=['nothing']"]},
        ],
    )  # fmt: skip
    code, stdout, stderr = finish(drive(path, out, "--jobs", "2", "--json"))
    assert code == 1, stderr
    assert "failed: cells/broken/seed-0_projection-0 (training, exit code 2)" in stderr
    assert "time left unknown" in stderr
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads(stdout)
    (failed,) = results["failed"]
    assert failed["run"] == "cells/broken/seed-0_projection-0" and failed["code"] == 2
    assert "nothing" in failed["last_lines"][-1]

    two, broken = results["cells"]
    assert broken["runs"][0]["state"] == "failed" and broken["summary"] is None
    assert [run["seed"] for run in two["runs"]] == [0, 1] and {run["state"] for run in two["runs"]} == {"done"}
    # The choice: by the best validation of each candidate's run, and only the chosen one has been near the test.
    best = {}
    for candidate in two["candidates"]:
        lr = candidate["values"]["optim.lr"]
        (metrics,) = (out / "cells" / "two" / f"seed-0_projection-0_lr-{lr}").glob("*/metrics.jsonl")
        best[lr] = max(row["validation_reward"] for row in rows_of(metrics) if row["step"])
        assert candidate["validation"]["reward"] == best[lr]
    lr = max(best, key=lambda one: best[one])
    assert two["chosen"] == {"optim.lr": lr}
    judged = {path.parent.name for path in out.glob("cells/*/*/items.jsonl")}
    assert judged == {f"seed-0_projection-0_lr-{lr}", f"seed-1_projection-0_lr-{lr}"}

    shares: dict[str, list[float]] = {"strict": [], "value_only": []}
    for run in two["runs"]:
        rows = rows_of(out / run["items"])
        for score in ("strict", "value_only"):
            base, tuned = (
                {row["item_id"]: row[score] >= 1 for row in rows if row["condition"] == name}
                for name in ("untrained", "adapter")
            )
            assert list(base) == list(tuned) and len(base) == 12
            won = sum(tuned[item] and not base[item] for item in base)
            lost = sum(base[item] and not tuned[item] for item in base)
            said = run[score]
            assert (said["won"], said["lost"]) == (won, lost)
            assert said["base"] == {"correct": sum(base.values()), "total": 12}
            assert said["tuned"] == {"correct": sum(tuned.values()), "total": 12}
            assert said["p_value"] == pytest.approx(stats.binomtest(won, won + lost).pvalue if won + lost else 1.0)
            shares[score].append(sum(tuned.values()) / 12)
        config = load_recipe(str(out / run["run"] / "config.toml"))
        assert (config.train.seed, config.optim.lr, config.train.num_threads) == (run["seed"], lr, run["threads"])
        assert config.eval.num_test == 0
        metrics = [row for row in rows_of(out / run["run"] / "metrics.jsonl") if row["step"]]
        assert run["tokens_sampled"] == sum(row["tokens_sampled"] for row in metrics)
        assert run["samples"] == 3 * 2 * 2 and run["steps"] == 3
        assert run["trained_numbers"] == 6 == two["trained_numbers"]  # 21 modules, 8 to a group, u = 2
        assert run["adapter_bytes"] == (out / run["run"] / "adapter.safetensors").stat().st_size
        assert 0 < run["portable_bytes"] < 200
    for score, values in shares.items():
        said = two["summary"][score]
        assert said["mean"] == pytest.approx(sum(values) / 2)
        assert (said["min"], said["max"]) == (min(values), max(values))
        assert said["sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        gain = said["mean"] - two["runs"][0][score]["base"]["correct"] / 12
        assert said["pooled"]["difference"] == pytest.approx(gain)
    assert two["runs"][0]["value_only"]["won"] + two["runs"][0]["value_only"]["lost"] > 0  # else nothing was tested

    # The untrained model answered once, and both runs are compared with these very replies.
    (kept,) = (out / "untrained").glob("*.jsonl")
    assert list(results["untrained"]) == [kept.stem]
    texts = [row["text"] for row in rows_of(kept)]
    for run in two["runs"]:
        rows = rows_of(out / run["items"])
        assert [row["text"] for row in rows if row["condition"] == "untrained"] == texts

    # Once more: only what failed is tried again.
    code, _, stderr = finish(drive(path, out))
    assert code == 1 and "broken seed 0: training" in stderr and "two seed" not in stderr
    # And another sweep does not get in.
    other = tinylora_("sweep", str(sweep_file(tmp_path, recipe=str(tiny_recipe))), "--out", str(out))
    assert other.exit_code == 2 and "holds another sweep" in other.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_sweep_goes_on_where_it_was(how: signal.Signals, tiny_recipe: Path, out: Path, tmp_path: Path) -> None:
    path = sweep_file(
        tmp_path, recipe=str(tiny_recipe), evaluate={"num_items": 4}, cell=[{"name": "long"}],
        set=["train.steps=40", "eval.every=20"],
    )  # fmt: skip
    process = drive(path, out)
    metrics: list[Path] = []
    deadline = time.monotonic() + 120
    while not (metrics and len(rows_of_whole(metrics[0])) > 5):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
        metrics = list(out.glob("cells/long/*/*/metrics.jsonl"))
    process.send_signal(how)
    code, _, stderr = finish(process)
    if how == signal.SIGINT:
        assert code == 130
        assert f"go on with: tinylora sweep {path} --out {out}" in stderr
        assert json.loads((out / "results.json").read_text())["cells"][0]["runs"][0]["state"] == "half trained"
    at_the_kill = len(rows_of_whole(metrics[0]))
    assert at_the_kill < 35
    code, stdout, stderr = finish(drive(path, out, "--json"))
    assert code == 0, stderr
    assert "long seed 0: training goes on" in stderr
    (run,) = json.loads(stdout)["cells"][0]["runs"]
    assert run["state"] == "done" and run["steps"] == 40
    assert list(out.glob("cells/long/*/*/metrics.jsonl")) == metrics  # the same run, not a second one
    talk = next(out.glob("cells/long/*/talk.txt")).read_text()
    assert "resuming" in talk


def rows_of_whole(path: Path) -> list[str]:
    return path.read_text().split("\n")[:-1]


def test_nothing_is_begun_after_until(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    sweep = load_sweep(sweep_file(tmp_path, seeds=[0, 1]))
    monkeypatch.setattr(driver_module.subprocess, "Popen", lambda *_, **__: pytest.fail("a child was started"))
    results = Driver(
        sweep, tmp_path / "out", jobs=2, threads=1, command=[], say=said.append, until=datetime(2020, 1, 1)
    ).run()
    assert results["not_run"] == ["cells/a/seed-0_projection-0", "cells/a/seed-1_projection-0"]
    assert [run["state"] for run in results["cells"][0]["runs"]] == ["not run", "not run"]
    assert any("nothing new is begun" in line for line in said)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


def test_stopping_ends_the_children_though_the_results_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    sweep = load_sweep(sweep_file(tmp_path))
    driver = Driver(sweep, tmp_path / "out", jobs=1, threads=1, command=[], say=said.append)
    (run,) = sweep.cells[0].candidates()
    waits_for_input = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    process = subprocess.Popen(waits_for_input, stdin=subprocess.PIPE)
    talk = (tmp_path / "talk.txt").open("ab")
    driver.children.append(driver_module.Child(driver_module.Job("training", run), process, talk, 0, 0.0))

    def interrupted_import() -> None:
        raise RuntimeError("half imported")

    monkeypatch.setattr(driver, "_write", interrupted_import)
    driver._stop()
    assert process.returncode == 0 and driver.children == []
    assert said[-1].endswith("results.json is not up to date (half imported); the same command makes it so")


def test_a_child_that_prints_for_ever_has_a_bounded_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wrote 320 MB in 10 s, and would have filled the disk. Its beginning and its end are kept."""
    monkeypatch.setattr(talk_module, "MOST_TALK_BYTES", 100_000)
    monkeypatch.setattr(talk_module, "KEPT_TALK_BYTES", 10_000)
    printing = "import sys\nprint('begin')\nfor i in range(2_000_000): print('again and again', i)\nsys.exit('the end')"
    sweep = load_sweep(sweep_file(tmp_path))
    driver = Driver(
        sweep, tmp_path / "out", jobs=1, threads=1, command=[sys.executable, "-c", printing], say=lambda _: None
    )
    driver.run()
    (talk,) = tmp_path.glob("out/cells/*/*/talk.txt")
    text = talk.read_text()
    assert talk.stat().st_size <= 100_000 and "bytes are left out here]" in text
    assert text.startswith("$ tinylora train") and "\nbegin\n" in text and text.endswith("the end\n")
    (failure,) = [state.failure for state in driver.states.values()]
    assert failure is not None and failure.lines[-1] == "the end"


def test_a_line_without_an_end_is_not_kept_whole(tmp_path: Path) -> None:
    path = tmp_path / "talk.txt"
    path.write_bytes(b"x" * 50_000)
    assert [len(line) for line in talk_module.last_lines(path, 0)] == [1003]
    assert talk_module.last_lines(path, 60_000) == talk_module.last_lines(path, 0)  # cut since


def test_two_sweeps_do_not_work_in_one_folder(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path))
    one, two = (Driver(sweep, tmp_path, jobs=1, threads=1, command=[], say=print) for _ in range(2))
    with one._lock(), pytest.raises(UserError, match="in use by another sweep"):
        two.run()
