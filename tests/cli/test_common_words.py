"""Words of the command line: in any encoding on the way in, and ready for a shell on the way out."""

import ast
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_config
from typer.testing import CliRunner

import tinylora
from tinylora.cli import app
from tinylora.config.recipe import apply_overrides
from tinylora.config.run import RunConfig
from tinylora.config.schema import dump_config
from tinylora.errors import UserError
from tinylora.talk import shell_line

PACKAGE = Path(tinylora.__file__).parent


@pytest.mark.skipif(os.name == "nt", reason="words of Windows are text")
@pytest.mark.parametrize(
    "words",
    [
        ["chat", "RUN", "--prompt", b"caf\xe9"],
        ["train", "demo", "--set", b"prompt.system=caf\xe9"],
        ["train", b"caf\xe9.toml"],
        ["eval", b"caf\xe9-001", "--task", "demo"],
        ["report", "RUN", "--out", b"\xff.html"],
        ["decode", b"TINY-\xff"],
        [b"tr\xe4in", "demo"],
    ],
)
def test_bytes_of_another_encoding_are_told(words: list[Any]) -> None:
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "-m", "tinylora", *words], capture_output=True, timeout=300, env=environment)
    assert done.returncode == 2, done.stderr
    assert b"is not UTF-8 text" in done.stderr and b"Traceback" not in done.stderr and b"\\udc" in done.stderr


@pytest.mark.parametrize(
    "setting", ["prompt.system", "task.path", "model.name", "task.options.a", "task.scorer_options.b", "sft.target"]
)
def test_half_characters_are_no_setting(setting: str) -> None:
    with pytest.raises(UserError, match=f"^{setting}.* must be text that UTF-8 has"):
        apply_overrides(RunConfig(), [f"{setting}=caf\udce9"])


def test_a_line_for_the_shell() -> None:
    words = ["tinylora", "train", "--resume", Path("my runs/it's-001"), "$(x)", "a;b", ""]
    assert shlex.split(shell_line(*words)) == [str(word) for word in words]


def test_no_command_is_put_together_without_quotes() -> None:
    """A path behind the words of a command, in an f-string, would be printed as it is."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else []
            for before, after in itertools.pairwise(parts):
                is_text = isinstance(before, ast.Constant) and isinstance(after, ast.FormattedValue)
                if is_text and re.search(r"\btinylora [a-z]+( -[\w-]+)* $", str(before.value)):
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not found, f"{found}: print commands by talk.shell_line"


def test_a_recipe_of_any_name_trains_and_its_next_commands_can_be_pasted(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name was refused after model and basis were loaded, and the printed commands fell apart at its space."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text("".join(f'{{"question": "{i}", "answer": "{i}"}}\n' for i in range(99)))
    config = tiny_config(tiny_folder, train={"steps": 1}, task={"name": "jsonl", "path": "q.jsonl"})
    recipe = tmp_path / "Über my 🚀 task.v2.toml"
    recipe.write_text(dump_config(config), encoding="utf-8")
    done = CliRunner().invoke(app, ["train", recipe.name, "--out", "my runs"])
    assert done.exit_code == 0, done.output
    run = tmp_path / "my runs" / "Uber-my-task.v2-001"
    assert (run / "adapter.safetensors").is_file()
    for verb in ("chat", "train --resume", "encode"):
        printed = re.search(rf"tinylora {verb} '([^']*)'", done.output)
        assert printed and Path(printed[1]).resolve() == run, done.output
    named = CliRunner().invoke(app, ["train", recipe.name, "--out", "my runs", "--name", "mine"])
    assert named.exit_code == 0 and (tmp_path / "my runs" / "mine-001").is_dir(), named.output


def test_a_name_is_looked_at_first() -> None:
    for name, message in [("my run", "--name must be letters"), ("x" * 300, "--name must have at most 100 characters")]:
        done = CliRunner().invoke(app, ["train", "demo", "--name", name])
        assert done.exit_code == 2 and message in done.output, done.output
