"""Own is what this user made here; a stranger's file or folder chooses no code, no file that is read, no network."""

import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import ByteTask, tiny_config
from typer.testing import CliRunner

from tinylora.cli import app
from tinylora.config.recipe import apply_overrides, load_recipe
from tinylora.config.run import RunConfig
from tinylora.config.schema import dump_config
from tinylora.errors import UserError
from tinylora.models.bases import remember
from tinylora.models.load import load_base_model
from tinylora.store.adapter_file import BEST, load_vector, save_vector
from tinylora.store.own import is_own, refuse_or_trust, remember_own, unsettled
from tinylora.store.run_folder import RunFolder
from tinylora.training.train import resume, train

pytestmark = pytest.mark.usefixtures("fresh_cache")
RUNNER = CliRunner()
WITNESS = """
from pathlib import Path
Path("ran").touch()
def score(item, text):
    return 1.0
"""
MODULES = ["task.scorer=helper:score"]
UNSAFE = ["task.name=mbpp", "task.scorer=python-tests", "task.scorer_options.unsafe_without_namespaces=true"]
FILES = ["task.name=jsonl", "task.path=secret.jsonl"]


def tinylora(*words: Any, code: int) -> str:
    done = RUNNER.invoke(app, [str(word) for word in words])
    assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
    return done.stderr


@pytest.fixture
def stranger(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a stranger's run folder that says some settings; the working folder is that run, as after an unzip."""

    def make(*says: str) -> Path:
        folder = tmp_path / "stranger-001"
        folder.mkdir()
        config = apply_overrides(tiny_config(tiny_folder), ["eval.num_test=1", *says])
        save_vector(folder / BEST, torch.full((3, 2), 0.1), config)
        (folder / "config.toml").write_text(dump_config(config))
        (folder / "environment.json").write_text("{}")
        (folder / "helper.py").write_text(WITNESS)
        (folder / "secret.jsonl").write_text('{"question": "1", "answer": "1"}\n')
        remember(load_base_model(str(tiny_folder), device="cpu"))  # the base is no question here
        monkeypatch.chdir(folder)
        monkeypatch.delitem(sys.modules, "helper", raising=False)  # that of another test
        monkeypatch.setattr(sys, "path", [one for one in sys.path if "stranger" not in one])
        return folder

    return make


@pytest.mark.parametrize("says", [MODULES, UNSAFE, FILES], ids=["module", "unsafe", "file"])
@pytest.mark.parametrize("as_folder", [True, False], ids=["folder", "file"])
def test_eval_of_a_strangers_chooses_nothing(stranger: Callable[..., Path], says: list[str], as_folder: bool) -> None:
    folder = stranger(*says)
    reference = folder if as_folder else folder / BEST
    said = tinylora("eval", reference, "--num-items", "1", code=2)
    assert "was not made by you on this machine, and it says what to run, read or load here: task." in said
    assert "--trust" in said and "--task" in said and "Traceback" not in said
    assert not (folder / "ran").exists()


def test_the_scorer_of_the_command_line_takes_no_option_of_the_file(stranger: Callable[..., Path]) -> None:
    folder = stranger(*UNSAFE)
    for words in (["--set", "task.scorer=python-tests"], ["--task", "mbpp"]):
        said = RUNNER.invoke(app, ["eval", str(folder), *words, "--set", "task.path=gone"]).stderr
        assert "gone" in said and "without isolation" not in said


def test_running_without_isolation_is_said_each_time(stranger: Callable[..., Path], tmp_path: Path) -> None:
    folder = stranger(*UNSAFE)
    data = tmp_path / "mbpp"
    data.mkdir()
    row = {"text": "Write f.", "code": "def f(): return 1", "test_list": ["assert f() == 1"]}
    for split in ("train", "test"):
        rows = "".join(json.dumps({**row, "text": f"{split} {i}", "task_id": i}) + "\n" for i in range(20))
        (data / f"{split}.jsonl").write_text(rows)
    own = [*UNSAFE, f"task.path={data}"]
    config = apply_overrides(load_recipe(str(folder / "config.toml")), own)
    remember_own(config, print)
    save_vector(folder / BEST, torch.full((3, 2), 0.1), config)
    for _ in range(2):
        said = tinylora("eval", folder, "--num-items", "1", "--set", "generation.max_new_tokens=2", code=0)
        assert said.count("without isolation") == 1


def test_chat_of_a_strangers_run_runs_nothing(stranger: Callable[..., Path]) -> None:
    """It needs no task, so that there is nothing to ask."""
    folder = stranger(*MODULES, *FILES)
    tinylora("chat", folder, "--prompt", "a", "--max-new-tokens", "1", code=0)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("verb", ["chat", "verify", "export", "eval"])
def test_a_base_that_only_the_file_names_is_not_loaded(
    stranger: Callable[..., Path], verb: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stranger("model.name=evil/base")
    monkeypatch.setattr("tinylora.models.load.hub_folder", lambda *_: pytest.fail("asked the hub"))
    more = ["--to", "lora", "-o", "out"] if verb == "export" else []
    said = tinylora(verb, folder, *more, code=2)
    assert "'evil/base'" in said and "--model" in said


def test_resume_of_a_strangers_run(stranger: Callable[..., Path]) -> None:
    folder = stranger(*MODULES, *FILES)
    said = tinylora("train", "--resume", folder, code=2)
    assert "task.path = 'secret.jsonl', task.scorer = 'helper:score'" in said and "--trust" in said
    assert not (folder / "ran").exists()
    assert not (folder / "checkpoint").exists()
    (folder / BEST).unlink()  # a run that is trained and has no checkpoint is refused
    said = tinylora("train", "--resume", folder, "--trust", code=2)  # it has too few items, and is trusted
    assert (folder / "ran").exists() and "not made by you" not in said
    assert is_own(RunFolder.open(folder).read_config())


def test_a_question_is_asked_on_a_terminal(stranger: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stranger(*MODULES)
    questions: list[str] = []

    def answer(text: str, yes: bool) -> bool:
        questions.append(text)
        return yes

    monkeypatch.setattr("tinylora.store.own.ask_on_terminal", lambda text: answer(text, False))
    tinylora("eval", folder, "--num-items", "1", code=2)
    assert not (folder / "ran").exists() and "task.scorer = 'helper:score'" in questions[0]
    monkeypatch.setattr("tinylora.store.own.ask_on_terminal", lambda text: answer(text, True))
    tinylora("eval", folder, "--num-items", "1", code=0)
    assert (folder / "ran").exists()
    said = tinylora("eval", folder, "--num-items", "1", code=0)
    assert len(questions) == 2  # the answer holds
    assert said.count(f"scoring runs Python as you, without isolation: score of {folder / 'helper.py'}") == 1


def test_what_is_shown_of_a_stranger_is_plain_ascii(stranger: Callable[..., Path]) -> None:
    folder = stranger('task.scorer="os:\\u001b]0;owned\\u0007\\u202e"')
    said = tinylora("eval", folder, code=2)
    assert "\\x1b]0;owned" in said and said.isascii() and "\x1b" not in said


def test_own_runs_stay_own_moved_and_copied(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, a_stranger: Callable[[], None]
) -> None:
    (tmp_path / "helper.py").write_text(WITNESS)
    monkeypatch.chdir(tmp_path)
    config = apply_overrides(tiny_config(tiny_folder, train={"steps": 1}), MODULES)
    done = train(config, ByteTask(), out=tmp_path / "runs", say=lambda text: None)
    moved = tmp_path / "elsewhere" / "mine"
    moved.parent.mkdir()
    shutil.copytree(done.run, moved)
    shutil.rmtree(done.run)
    for one in (moved, moved / BEST):
        assert is_own(load_vector(one)[1])
    resume(moved, ["train.steps=2"], task=ByteTask(), say=lambda text: None)
    there = tmp_path / "unzipped"  # another module of that name is no own code
    there.mkdir()
    (there / "helper.py").write_text(WITNESS)
    (there / "other.py").write_text("import os")
    monkeypatch.chdir(there)
    kept = load_vector(moved)[1]  # names the module's folder, and is own with that one alone
    assert is_own(kept) and kept.task.scorer == f"{tmp_path / 'helper'}:score"
    for other in ("helper:score", f"{there / 'helper'}:score"):
        assert not is_own(replace(kept, task=replace(kept.task, scorer=other)))
    monkeypatch.chdir(tmp_path)
    assert is_own(load_vector(moved)[1])  # which takes down what code there is by now
    project = tmp_path / "project"  # but the whole folder, code and all, may move
    shutil.copytree(tmp_path, project, ignore=lambda _, names: [one for one in names if one == "project"])
    shutil.copytree(moved, project / "runs" / "run-001", dirs_exist_ok=True)
    monkeypatch.chdir(project)
    assert is_own(load_vector(project / "runs" / "run-001")[1])
    (project / "helper.py").write_text(WITNESS + "# edited, as one's own code may be\n")
    assert is_own(load_vector(project / "runs" / "run-001")[1])
    monkeypatch.chdir(tmp_path)
    a_stranger()
    assert not is_own(load_vector(moved)[1])
    with pytest.raises(UserError, match="--trust"):
        resume(moved, say=lambda text: None)


def test_marks_that_others_could_have_written_do_not_count(tmp_path: Path, a_stranger: Callable[[], None]) -> None:
    a_stranger()
    config = apply_overrides(RunConfig(), FILES)
    remember_own(config, print)
    assert is_own(config)
    marks = tmp_path / "data-of-another" / "own"
    assert stat.S_IMODE(marks.stat().st_mode) == 0o700
    marks.chmod(0o777)
    assert not is_own(config)
    marks.chmod(0o700)
    (damaged,) = marks.iterdir()
    damaged.write_text("{")
    assert not is_own(config)


def test_data_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TINYLORA_DATA", str(tmp_path / "file" / "data"))
    said: list[str] = []
    remember_own(apply_overrides(RunConfig(), FILES), said.append)
    assert len(said) == 1 and "TINYLORA_DATA" in said[0]


def test_settings_that_choose_nothing_are_nobodys_question() -> None:
    config = replace(RunConfig(), optim=replace(RunConfig().optim, lr=0.5))
    assert is_own(config) and unsettled(config, ["task", "model"]) == {}


def test_only_yes_is_yes(a_stranger: Callable[[], None]) -> None:
    a_stranger()
    config = apply_overrides(RunConfig(), FILES)
    left = unsettled(config, ["task"])
    assert left == {"task.path": "secret.jsonl"}
    for answer in (None, False):
        with pytest.raises(UserError, match="secret"):
            refuse_or_trust("x", config, left, trust=False, ask=lambda _, a=answer: a, say=print)  # type: ignore[misc]
    assert not is_own(config)
    refuse_or_trust("x", config, left, trust=False, ask=lambda _: True, say=print)
    assert is_own(config)
    assert os.environ["TINYLORA_DATA"].endswith("data-of-another")
