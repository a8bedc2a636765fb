"""settings: all of them, a section, one; for machines; names that are none."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from tinylora.cli import app
from tinylora.config.help import describe_fields, describe_sections
from tinylora.config.recipe import apply_overrides
from tinylora.config.run import RunConfig


def settings(*args: str, columns: int = 80) -> Any:
    return CliRunner().invoke(app, ["settings", *args], env={"COLUMNS": str(columns)})


@pytest.mark.parametrize("columns", [80, 110, 300])
def test_all_of_them_are_printed_and_fit(columns: int) -> None:
    result = settings(columns=columns)
    assert result.exit_code == 0 and not result.stderr
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= min(columns, 110)
    assert not any(line != line.rstrip() for line in lines)
    words = " ".join(result.stdout.split())
    for section in describe_sections():
        assert f"[{section.name}] {section.about}" in words
        for row in section.settings:
            assert f"({row.type})" in words and " ".join(row.help.split()) in words


def test_what_is_printed_can_be_set() -> None:
    keys = [row.key for row in describe_fields()]
    lines = [line.strip().partition("  (")[0] for line in settings().stdout.splitlines()]
    pairs = [line for line in lines if line.partition(" = ")[0] in keys]
    assert [pair.partition(" = ")[0] for pair in pairs] == keys
    assert apply_overrides(RunConfig(), pairs) == RunConfig()


def test_a_section_and_a_setting() -> None:
    section = settings("optim").stdout
    about = "[optim]  How v moves: Adam with a rate (grpo, sft, rft), or steps of so many\n  nats (npg).\n\n"
    assert section.startswith(about + "  optim.lr = 0.004  (a number)\n      Adam's learning rate.\n")
    assert "train." not in section and section.count(" = ") == 11
    one = settings("optim.lr").stdout
    assert one == about + "  optim.lr = 0.004  (a number)\n      Adam's learning rate.\n"


def test_json_is_one_object_with_values() -> None:
    told = json.loads(settings("--json").stdout)
    assert [row["key"] for row in told["settings"]] == [row.key for row in describe_fields()]
    assert list(told["sections"]) == [section.name for section in describe_sections()]
    assert all(set(row) == {"key", "type", "default", "help"} for row in told["settings"])
    rows = {row["key"]: row["default"] for row in told["settings"]}
    assert rows["optim.lr"] == 0.004 and rows["model.device"] == "auto" and rows["prompt.chat"] is True
    assert rows["reward"] == {"strict": 1.0} and rows["adapter.targets"] == ["all-linear"]
    assert [row["key"] for row in json.loads(settings("sft", "--json").stdout)["settings"]] == ["sft.target"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("optm", "'optim'"),
        ("optim.lrr", "'optim.lr'"),
        ("lr", "'optim.lr'"),
        ("seed", "'adapter.seed' or 'task.seed' or 'train.seed'"),
    ],
)
def test_a_name_that_is_none_is_one_sentence_with_the_nearest(name: str, nearest: str) -> None:
    result = settings(name)
    assert result.exit_code == 2 and not result.stdout
    assert f"{name!r}, did you mean {nearest}?" in result.stderr and result.stderr.count("\n") == 1
    assert "the sections are model, method, adapter," in result.stderr


def test_a_name_like_none_has_the_sections_alone() -> None:
    result = settings("xyzzy")
    assert result.exit_code == 2 and "did you mean" not in result.stderr
    assert result.stderr.endswith(", ".join(section.name for section in describe_sections()) + "\n")


def test_it_needs_no_torch_and_goes_into_a_pipe() -> None:
    code = (
        "import sys\nsys.argv = ['tinylora', 'settings']\nfrom tinylora.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "loaded = {'torch', 'transformers', 'numpy'} & set(sys.modules)\nassert not loaded, loaded"
    )
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == settings(columns=80).stdout
