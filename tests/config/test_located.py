"""Paths in a recipe lie beside it, and what a run keeps of them holds everywhere."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import tiny_config
from typer.testing import CliRunner

from tinylora.cli import app
from tinylora.config.located import located
from tinylora.config.recipe import apply_overrides, load_recipe, read_settings
from tinylora.config.run import RunConfig
from tinylora.config.schema import dump_config
from tinylora.errors import UserError
from tinylora.tasks.build import build_task
from tinylora.tasks.scorers.python import load_function
from tinylora.tasks.scorers.reference import bare_reference

ROWS = "".join(json.dumps({"question": str(i), "answer": str(i)}) + "\n" for i in range(99))
MODULE = "reward_of_test_located"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with questions and a scorer; the working folder and the home are others."""
    folder, elsewhere = tmp_path / "my project", tmp_path / "elsewhere"
    for one in (folder / "data", elsewhere):
        one.mkdir(parents=True)
    for file in (folder / "q.jsonl", folder / "data" / "q.jsonl"):
        file.write_text(ROWS)
    (folder / f"{MODULE}.py").write_text("def even(item, text):\n    return len(text) % 2 == 0\n")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    sys.modules.pop(MODULE, None)


def recipe(folder: Path, text: str) -> RunConfig:
    (folder / "mine.toml").write_text(text)
    return load_recipe(str(folder / "mine.toml"))


@pytest.mark.parametrize("written", ["q.jsonl", "./q.jsonl", "data/../q.jsonl", "~/q.jsonl", "ABSOLUTE/q.jsonl"])
def test_questions_beside_the_recipe(project: Path, written: str) -> None:
    written = written.replace("ABSOLUTE", str(project))
    config = recipe(project, f'[task]\nname = "jsonl"\npath = "{written}"\n')
    assert config.task.path == str(project / "q.jsonl")
    assert build_task(config.task, config.prompt).counts()["distinct"] == 99


def test_the_recipes_folder_comes_before_the_working_folder(project: Path) -> None:
    here = Path.cwd()
    (here / "q.jsonl").write_text(ROWS[:20])
    (here / "only-here.jsonl").write_text(ROWS)
    assert recipe(project, '[task]\npath = "q.jsonl"\n').task.path == str(project / "q.jsonl")
    there = recipe(project, '[task]\npath = "only-here.jsonl"\n')
    assert there.task.path == "only-here.jsonl" and located(there).task.path == str(here / "only-here.jsonl")
    assert apply_overrides(there, ["task.path=q.jsonl"]).task.path == "q.jsonl"  # of the command line: from here
    assert recipe(project, '[task]\npath = "nowhere.jsonl"\n').task.path == "nowhere.jsonl"


def test_a_home_in_python_and_in_set(project: Path) -> None:
    config = apply_overrides(RunConfig(), ["task.name=jsonl", "task.path=~/q.jsonl"])
    assert build_task(config.task, config.prompt).counts()["distinct"] == 99
    assert located(config).task.path == str(project / "q.jsonl")


def test_models_beside_the_recipe(project: Path) -> None:
    (project / "base").mkdir()
    (project / "base.gguf").write_bytes(b"GGUF")
    for name in ("base", "./base", "base.gguf"):
        assert recipe(project, f'[model]\nname = "{name}"\n').model.name == str(project / Path(name).name)
    for name in ("smollm2-135m-instruct", "org/name", "./none"):
        assert recipe(project, f'[model]\nname = "{name}"\n').model.name == name


@pytest.mark.parametrize("written", ["{m}:even", "{m}.py:even", "./{m}:even", "~/{m}.py:even"])
def test_scorers_beside_the_recipe(project: Path, written: str) -> None:
    config = recipe(project, f'[task]\nname = "jsonl"\npath = "q.jsonl"\nscorer = "{written.format(m=MODULE)}"\n')
    assert config.task.scorer == f"{project / MODULE}:even"
    task = build_task(config.task, config.prompt)
    assert task.score(task.items("test")[0], "ab")["strict"] == 1
    assert bare_reference(config.task.scorer) == f"{MODULE}:even"


def test_scorers_elsewhere(project: Path) -> None:
    package = project / "rewards"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "own.py").write_text("")
    assert recipe(project, '[task]\nscorer = "rewards.own:f"\n').task.scorer == f"{project / 'rewards.own'}:f"
    assert recipe(project, '[task]\nscorer = "math:gcd"\n').task.scorer == "math:gcd"  # Python's own, and no file
    (project / "random.py").write_text("def f(item, text):\n    return 1.0\n")
    with pytest.raises(UserError, match="Python has another module of that name"):
        load_function(recipe(project, '[task]\nscorer = "random:f"\n').task.scorer)
    for bad in ("a:", ":b", "a..b:c"):
        with pytest.raises(UserError, match="is written module:function"):
            load_function(bad)


def test_a_run_goes_on_and_is_evaluated_from_elsewhere(
    project: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's recipe beside its questions, named from another folder, resumed from a third."""
    config = tiny_config(tiny_folder, train={"steps": 1})
    (project / "mine.toml").write_text(
        dump_config(config)
        .replace('name = "reasoning_gym:chain_sum"\npath = ""', 'name = "jsonl"\npath = "q.jsonl"')
        .replace('scorer = "number"', f'scorer = "{MODULE}:even"')
    )
    trained = CliRunner().invoke(app, ["train", str(project / "mine.toml"), "--out", str(tmp_path / "runs")])
    assert trained.exit_code == 0, trained.output
    run = tmp_path / "runs" / "mine-001"
    assert read_settings(run / "config.toml").task.path == str(project / "q.jsonl")
    monkeypatch.chdir(tmp_path)
    for words in (["train", "--resume", str(run), "--set", "train.steps=2"], ["eval", str(run), "--num-items", "2"]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
