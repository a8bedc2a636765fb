"""Verbs: help, exit codes, stdout and stderr; eval, chat and inspect end to end on a tiny model."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import adapter_run
from typer.testing import CliRunner

import tinylora
import tinylora.training
from tinylora.cli import app
from tinylora.config.run import RunConfig
from tinylora.rollouts.runtime import Runtime

VERBS = (
    "train", "eval", "chat", "inspect", "bench", "cache", "recipes", "encode", "decode", "verify", "export", "import",
    "diff", "mix", "card", "push", "pull", "report", "sweep", "figure", "settings",
)  # fmt: skip


def tinylora_(*args: str, input: str | None = None) -> Any:
    result: Any = CliRunner().invoke(app, list(args), input=input)
    return result


def python(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)


@pytest.fixture
def run(tiny_folder: Path, fresh_cache: Path, tmp_path: Path) -> Path:
    """A run folder with three trained numbers of the tiny model."""
    return adapter_run(tiny_folder, tmp_path)


@pytest.fixture
def fake_train(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for training: records its arguments, makes a run folder, then does what `then` does."""
    seen = SimpleNamespace(then=lambda: None, calls=[], result=None)

    def train(config: RunConfig, *, out: Path, name: str, say: Any) -> Any:
        seen.calls.append((config, out, name))
        folder = out / f"{name}-001"
        folder.mkdir(parents=True)
        say("step 1/1")
        seen.then()
        return SimpleNamespace(run=folder, v=torch.tensor([[0.5], [-0.25]]), steps=1, seconds=2.0, result=seen.result)

    def resume(run: Path, overrides: Any, *, say: Any) -> Any:
        seen.calls.append((run, overrides))
        seen.then()
        return SimpleNamespace(run=run, v=torch.tensor([[0.5]]), steps=3, seconds=2.0, result=None)

    module = SimpleNamespace(train=train, resume=resume)
    monkeypatch.setitem(sys.modules, "tinylora.training.train", module)  # type: ignore[arg-type]
    monkeypatch.setattr(tinylora.training, "train", module, raising=False)
    return seen


# --- help, environment ---


@pytest.mark.parametrize("verb", VERBS)
def test_help_leads_with_examples(verb: str) -> None:
    result = tinylora_(verb, "--help")
    assert result.exit_code == 0
    examples = result.stdout.index("Examples:")
    assert examples < result.stdout.index("Options:")
    assert f"\n    tinylora {verb}" in result.stdout[examples:]


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, typer\nbefore = set(sys.modules)\n"  # some versions of typer import rich
        "sys.argv = ['tinylora', '--help']\nfrom tinylora.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "loaded = {'torch', 'transformers', 'numpy', 'scipy', 'rich', 'tqdm'} & (set(sys.modules) - before)\n"
        "assert not loaded, loaded"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {verb}" in done.stdout for verb in VERBS)


def test_importing_is_silent_and_other_lines_of_the_same_loggers_are_not() -> None:
    """torchao and bitsandbytes, where they are installed, complain at their import that they have no kernels."""
    code = (
        "import logging, tinylora\ntinylora.train, tinylora.load_adapter\nimport peft, bitsandbytes, torchao\n"
        "for name in ('torchao', 'torch.utils._pytree'): logging.getLogger(name).warning('something else')"
    )
    done = python(code)
    assert done.returncode == 0 and not done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all(line.endswith("something else") for line in lines), done.stderr


def test_the_environment_is_set_unless_the_user_set_it() -> None:
    code = (
        "import os, sys\nsys.argv = ['tinylora', '--help']\nfrom tinylora.cli import main\n"
        "assert 'GOMP_SPINCOUNT' not in os.environ, 'importing changes nothing'\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([os.environ[k] for k in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'TOKENIZERS_PARALLELISM')])"
    )
    done = python(code, OMP_WAIT_POLICY="ACTIVE", TOKENIZERS_PARALLELISM="false")
    assert "['ACTIVE', '1000', 'false']" in done.stdout, done.stderr


# --- exit codes ---


@pytest.mark.parametrize("args", [("nonsense",), ("train", "demo", "--nonsense"), ("eval",)])
def test_misuse_exits_with_2(args: tuple[str, ...]) -> None:
    result = tinylora_(*args)
    assert result.exit_code == 2 and not result.stdout


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("train", "nothing"), "no recipe is named 'nothing'"),
        (("train",), "name a recipe, such as: tinylora train demo"),
        (("train", "demo", "--set", "optim.rate=1"), "unknown key 'rate' in section [optim]"),
        (("train", "demo", "--resume", "runs/x"), "--resume goes on with a run as it is"),
        (("train", "demo", "--dry-run", "--set", "adapter.targets=['nope']"), "match no linear map"),
        (
            ("train", "demo", "--dry-run", "--set", "adapter.u=1", "--set", "adapter.rank=300"),
            "adapter.rank 300 exceeds the smallest",
        ),
        (("eval", "no/such/run"), "there is no adapter 'no/such/run'"),
        (("chat", "no/such/run"), "there is no adapter 'no/such/run'"),
        (("inspect", "nonsense"), "no model is named 'nonsense'"),
        (("inspect", "smollm2-135m-instruct", "--landscape", "--shapes"), "--landscape needs the weights"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_2(args: tuple[str, ...], sentence: str, fresh_cache: Path) -> None:
    result = tinylora_(*args)
    assert result.exit_code == 2 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("tinylora: ") and sentence in line


def test_other_exceptions_are_not_hidden(fake_train: SimpleNamespace, tmp_path: Path) -> None:
    def bug() -> None:
        raise ZeroDivisionError("a bug")

    fake_train.then = bug
    result = tinylora_("train", "demo", "--out", str(tmp_path))
    assert result.exit_code == 1 and isinstance(result.exception, ZeroDivisionError)


def test_a_full_disk_is_one_sentence(fake_train: SimpleNamespace, tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "some/file")

    fake_train.then = full
    result = tinylora_("train", "demo", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("tinylora: the disk is full at some/file")


def test_another_os_error_is_not_taken_for_a_full_disk(fake_train: SimpleNamespace, tmp_path: Path) -> None:
    def other() -> None:
        raise OSError(errno.ECHILD, "No child processes")

    fake_train.then = other
    assert tinylora_("train", "demo", "--out", str(tmp_path)).exit_code == 1


def test_a_place_that_is_none_is_one_sentence(fake_train: SimpleNamespace, tmp_path: Path) -> None:
    fake_train.then = lambda: (tmp_path / "file" / "x").write_text("")
    (tmp_path / "file").write_text("")
    result = tinylora_("train", "demo", "--out", str(tmp_path / "runs"))
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"tinylora: {tmp_path}/file/x: not a directory; name another place"


def test_ctrl_c_says_how_to_go_on(fake_train: SimpleNamespace, tmp_path: Path) -> None:
    for number in range(2, 40):  # older runs are not the one to resume
        (tmp_path / f"demo-{number:03d}").mkdir()

    def interrupt() -> None:
        raise KeyboardInterrupt

    fake_train.then = interrupt
    result = tinylora_("train", "demo", "--out", str(tmp_path))
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].endswith(f"go on with: tinylora train --resume {tmp_path / 'demo-001'}")
    result = tinylora_("train", "--resume", "runs/other")
    assert result.exit_code == 130 and "--resume runs/other" in result.stderr


def test_a_closed_pipe_is_quiet() -> None:
    code = "import sys\nsys.argv = ['tinylora', 'recipes']\nfrom tinylora.cli import main\nmain()"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert done.stderr == "" and done.returncode == 141


def test_version_and_module() -> None:
    assert tinylora_("--version").stdout == f"tinylora {tinylora.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "tinylora", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"tinylora {tinylora.__version__}\n")


# --- train ---


def test_train_calls_training_with_the_recipe(fake_train: SimpleNamespace, tmp_path: Path) -> None:
    result = tinylora_("train", "demo", "--set", "optim.lr=0.5", "--out", str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    ((config, out, name),) = fake_train.calls
    assert (config.optim.lr, out, name) == (0.5, tmp_path, "demo")
    told = json.loads(result.stdout)
    assert told["run"] == str(tmp_path / "demo-001") and told["v"] == [0.5, -0.25] and told["result"] is None
    assert "step 1/1" in result.stderr


def test_the_final_evaluation_is_the_result(
    fake_train: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_train.result = {"verdict": "it learned"}
    monkeypatch.setattr("tinylora.evaluation.verdict.format_result", lambda result: f"VERDICT {result['verdict']}")
    assert tinylora_("train", "demo", "--out", str(tmp_path / "a")).stdout == "VERDICT it learned\n"
    told = json.loads(tinylora_("train", "demo", "--out", str(tmp_path / "b"), "--json").stdout)
    assert told["result"] == {"verdict": "it learned"}


def test_resume_passes_changes_on(fake_train: SimpleNamespace) -> None:
    result = tinylora_("train", "--resume", "runs/demo-001", "--set", "train.steps=9")
    assert result.exit_code == 0
    assert fake_train.calls == [(Path("runs/demo-001"), ["train.steps=9"])]
    assert "next: tinylora eval runs/demo-001" in result.stdout


def test_dry_run_trains_nothing_and_loads_no_weights(
    fake_train: SimpleNamespace, fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("tinylora.models.load.load_base_model", refuse)
    monkeypatch.setattr("tinylora.models.load.embedded_file", refuse)
    args = ("train", "demo", "--dry-run", "--out", str(tmp_path / "runs"), "--set", "train.num_threads=1")
    few = ("--set", "generation.max_batch_rows=4")  # else what is timed takes half a minute of an old core
    result = tinylora_(*args, *few, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["num_modules"], told["num_trained"], told["bytes_bfloat16"]) == (210, 13, 26)
    assert told["plan"]["hours"] > 0 and told["memory"]["total"] > told["memory"]["weights"] > 0
    assert not fake_train.calls and not (tmp_path / "runs").exists()


# --- eval, chat, inspect ---


def test_eval_prints_a_table_or_json(run: Path) -> None:
    result = tinylora_("eval", str(run), "--num-items", "4")
    assert result.exit_code == 0, result.output
    first, *rest = result.stdout.splitlines()
    assert first.startswith("comparing the untrained ") and "4 test items of jsonl" in first
    assert [line.split()[0] for line in rest[1:5]] == ["strict", "value", "stopped", "tokens"]
    result = tinylora_("eval", str(run / "adapter.safetensors"), "--task", "jsonl", "--num-items", "4", "--json")
    told = json.loads(result.stdout)
    assert told["num_items"] == told["strict"]["base"]["total"] == 4
    assert {"strict", "value_only", "stopped"} <= set(told)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--items", "{tmp}"), "{tmp} is a folder; give a file"),
        (("--items", "{tmp}/file/x.jsonl"), "cannot write {tmp}/file/x.jsonl ("),
        (("--untrained", "{tmp}/file/x.jsonl"), "cannot write {tmp}/file/x.jsonl ("),
        (("--controls", "--out", "{tmp}/file"), "cannot write {tmp}/file/evidence.json ("),
        (("--samples", "2", "--num-items", "-3"), "--num-items must be at least 1, or 0"),
    ],
)
def test_eval_finds_out_first_where_it_cannot_write(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], sentence: str
) -> None:
    (tmp_path / "file").write_text("")
    if "--samples" not in words:
        monkeypatch.setattr("tinylora.rollouts.runtime.open_runtime", lambda *args, **options: pytest.fail("loaded"))
    result = tinylora_("eval", str(run), *(word.format(tmp=tmp_path) for word in words))
    assert result.exit_code == 2, (result.output, result.exception)
    assert sentence.format(tmp=tmp_path) in result.stderr.splitlines()[-1]


def test_the_untrained_models_replies_are_kept_before_the_adapter_answers(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained = tmp_path / "untrained.jsonl"
    words = ("eval", str(run), "--num-items", "5", "--untrained", str(untrained))
    whole = Runtime.answer

    def stopped(self: Runtime, items: Any, v: Any, **options: Any) -> Any:
        if v is not None:
            raise KeyboardInterrupt
        return whole(self, items, v, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "answer", stopped)
        assert tinylora_(*words).exit_code == 130
    assert len(untrained.read_text().splitlines()) == 5
    again = tinylora_(*words)
    assert again.exit_code == 0 and "untrained model's replies are taken from" in again.stderr


def test_eval_writes_items_and_takes_the_untrained_models_from_a_file(
    run: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    items, untrained = tmp_path / "out" / "items.jsonl", tmp_path / "untrained.jsonl"
    words = ("eval", str(run), "--num-items", "5", "--items", str(items), "--untrained", str(untrained), "--json")
    first = tinylora_(*words)
    assert first.exit_code == 0, first.output
    said = json.loads(first.stdout)
    rows = [json.loads(line) for line in items.read_text().split("\n") if line]
    assert [row["condition"] for row in rows] == ["untrained"] * 5 + ["adapter"] * 5
    assert {row["protocol"] for row in rows} == {said["protocol"]}
    assert said["strict"]["tuned"]["correct"] == sum(row["strict"] >= 1 for row in rows[5:])
    assert "untrained: 5/5 items" in first.stderr
    before = items.read_text()
    refused = tinylora_(*words)
    assert refused.exit_code == 2 and "exists; choose another file, or replace it with --force" in refused.stderr
    words = (*words, "--force")
    again = tinylora_(*words)
    assert "untrained model's replies are taken from" in again.stderr and "untrained: 5/5" not in again.stderr
    assert items.read_text() == before and json.loads(again.stdout) == said
    kept = [json.loads(line) for line in untrained.read_text().split("\n") if line]
    assert [row["text"] for row in kept] == [row["text"] for row in rows[:5]]
    # They are no partner for other items, and not for a base that is another.
    other = tinylora_("eval", str(run), "--num-items", "6", "--untrained", str(untrained))
    assert other.exit_code == 2 and "holds replies to something else (protocol" in other.stderr
    untrained.write_text(untrained.read_text().replace('"base": "', '"base": "ff'))
    other = tinylora_(*words)
    assert other.exit_code == 2 and "holds replies to something else (base" in other.stderr
    # Nor for another base that the same adapter is put on.
    untrained.unlink()
    assert tinylora_(*words).exit_code == 0
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    save_file(
        {k: v * 1.01 if "down_proj" in k else v for k, v in tensors.items()},
        copy / "model.safetensors",
        {"format": "pt"},
    )
    other = tinylora_(*words, "--model", str(copy), "--other-base")
    assert other.exit_code == 2 and "holds replies to something else (base" in other.stderr, other.output
    refused = tinylora_("eval", str(run), "--items", str(items), "--samples", "2")
    assert refused.exit_code == 2 and "--items and --untrained go with one reply an item" in refused.stderr


def test_eval_refuses_another_adapter_config(run: Path) -> None:
    result = tinylora_("eval", str(run), "--set", "adapter.rank=1")
    assert result.exit_code == 2 and "adapter settings cannot be changed" in result.stderr


def test_a_line_that_chat_cannot_answer_costs_no_other(run: Path) -> None:
    text = "1 + 2\n" + "long " * 3000 + "\n3 + 4\n"
    result = tinylora_("chat", str(run), "--max-new-tokens", "4", "--json", input=text)
    assert result.exit_code == 2
    first, bad, last = json.loads(result.stdout)["replies"]
    assert first["prompt"] == "1 + 2" and last["prompt"] == "3 + 4" and last["adapted"]["num_tokens"] > 0
    assert "context" in bad["error"] and f"tinylora: {bad['error']}" in result.stderr
    refused = tinylora_("chat", str(run), "--temperature", "-1", "--json", input=text)
    assert refused.exit_code == 2 and not refused.stdout and "temperature must be" in refused.stderr


def test_chat_reads_lines_of_another_encoding(run: Path) -> None:
    command = [sys.executable, "-m", "tinylora", "chat", str(run), "--max-new-tokens", "2", "--json"]
    done = subprocess.run(command, input=b"caf\xe9\n1 + 2\n", capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [pair["prompt"] for pair in json.loads(done.stdout)["replies"]] == ["caf\ufffd", "1 + 2"]


def test_chat_answers_prompts_and_lines(run: Path) -> None:
    result = tinylora_("chat", str(run), "--prompt", "1 + 2", "--prompt", "3 + 4", "--max-new-tokens", "4", "--json")
    assert result.exit_code == 0, result.output
    replies = json.loads(result.stdout)["replies"]
    assert [reply["prompt"] for reply in replies] == ["1 + 2", "3 + 4"]
    assert set(replies[0]) == {"prompt", "base", "adapted"}
    result = tinylora_("chat", str(run), "--max-new-tokens", "4", input="1 + 2\n\n3 + 4\n")
    assert result.exit_code == 0 and result.stdout.count("untrained (") == result.stdout.count("adapted (") == 2


def test_inspect_and_landscape(run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    settings = ("--set", "adapter.n_tie=8", "--set", "train.num_threads=1", "--set", "model.dtype=float32")
    result = tinylora_("inspect", str(tiny_folder), *settings)
    assert result.exit_code == 0, result.output
    assert "would train 3 numbers (12 bytes in float32, 6 in bf16)" in result.stdout
    assert "read from its weights" in result.stdout
    result = tinylora_("inspect", str(tiny_folder), "--shapes", *settings, "--json")
    assert json.loads(result.stdout)["num_trained"] == 3
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'[task]\nname = "jsonl"\npath = "{tmp_path / "sums.jsonl"}"\n[generation]\nmax_new_tokens = 4\n')
    scan = ("--landscape", "--norms", "0.1,1", "--vectors", "1", "--items", "3", "--recipe", str(recipe))
    result = tinylora_("inspect", str(tiny_folder), *scan, *settings, "--json")
    assert result.exit_code == 0, result.output
    assert [row["norm"] for row in json.loads(result.stdout)["rows"]] == [0, 0.1, 1]
    result = tinylora_("inspect", str(tiny_folder), *scan, *settings)
    assert "KL(base || adapted)" in result.stdout
    result = tinylora_("inspect", str(tiny_folder), "--landscape", "--norms", "a,b", *settings, "--recipe", str(recipe))
    assert result.exit_code == 2 and "--norms must be numbers" in result.stderr


# --- cache, recipes ---


def test_cache_shows_and_clears(empty_cache: Path) -> None:
    (empty_cache / "basis").mkdir(parents=True)
    (empty_cache / "basis" / "x").write_bytes(b"1" * 1000)
    told = json.loads(tinylora_("cache", "--json").stdout)
    assert told["entries"][0]["total_bytes"] == 1000
    assert json.loads(tinylora_("cache", "--clear", "--json").stdout)["freed_bytes"] == 1000
    assert "total" in tinylora_("cache").stdout and not (empty_cache / "basis").exists()


def test_a_cache_on_another_disk_is_emptied(empty_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "disk" / "deep" / "x").write_bytes(b"1" * 1000)
    empty_cache.mkdir(parents=True, exist_ok=True)
    (empty_cache / "converted").symlink_to(tmp_path / "disk")
    result = tinylora_("cache", "--clear", "--json")
    assert result.exit_code == 0 and not list((tmp_path / "disk").iterdir()), result.exception


def test_recipes_show_their_first_comment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.toml").write_text("# What b does.\n# More.\n[train]\n")
    (tmp_path / "a.toml").write_text("[train]\n")
    monkeypatch.setattr("tinylora.system.paths.recipes_dir", lambda: tmp_path)
    assert json.loads(tinylora_("recipes", "--json").stdout)["recipes"] == {"a": "", "b": "What b does."}
    assert "b  What b does." in tinylora_("recipes").stdout
