"""A resumed run is trained under the settings that it began with, whatever was edited since."""

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_run import ByteTask, metrics_of, quiet, start

from tinylora.config.resume import check_as_begun
from tinylora.config.run import RunConfig
from tinylora.config.schema import dump_config
from tinylora.errors import UserError
from tinylora.store.checkpoint import unpack
from tinylora.training.train import resume

pytestmark = pytest.mark.usefixtures("fresh_cache")


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path) -> Path:
    return start(tiny_folder, tmp_path / "runs", train={"steps": 2}).run


def edit(run: Path, pattern: str, line: str) -> str:
    before = (run / "config.toml").read_text()
    after, count = re.subn(rf"(?m)^{pattern}.*$", line, before, count=1)
    assert count == 1
    (run / "config.toml").write_text(after)
    return before


def state_of(run: Path) -> dict[str, Any]:
    return {str(one): one.read_bytes() for one in run.rglob("*") if one.is_file() and one.name not in (".lock",)}


@pytest.mark.parametrize(
    ("pattern", "line", "key"),
    [
        ("lr = ", "lr = 0.5", "optim.lr"),
        ("n_tie = ", "n_tie = 4", "adapter.n_tie"),
        ("seed = ", "seed = 7", "adapter.seed"),
        ("group_size = ", "group_size = 4", "grpo.group_size"),
        ("system = ", 'system = "other"', "prompt.system"),
        ("value_only = ", "value_only = 2.0", "reward.value_only"),
    ],
)
def test_settings_that_were_edited_are_refused(run: Path, pattern: str, line: str, key: str) -> None:
    before = edit(run, pattern, line)
    as_it_was = state_of(run)
    with pytest.raises(UserError, match=f"is not what the run was trained under: {re.escape(key)} "):
        resume(run, ["train.steps=3"], task=ByteTask(), say=quiet)
    assert state_of(run) == as_it_was  # nothing is cut or written
    (run / "config.toml").write_text(before)
    assert resume(run, ["train.steps=3"], task=ByteTask(), say=quiet).steps == 3
    assert len(metrics_of(run)) == 4
    assert resume(run, ["train.steps=4"], task=ByteTask(), say=quiet).steps == 4  # the change by --set is no edit


def test_steps_and_logs_may_be_edited(run: Path) -> None:
    edit(run, "steps = ", "steps = 3")
    edit(run, "samples_per_step = ", "samples_per_step = 0")
    assert resume(run, task=ByteTask(), say=quiet).steps == 3


def test_a_checkpoint_keeps_the_settings(run: Path) -> None:
    newest = sorted((run / "checkpoint").glob("*.safetensors"))[-1]
    assert unpack(newest)[0]["settings"] == (run / "config.toml").read_text()
    assert "v" in load_file(newest)


def test_checkpoints_from_before_that_go_on() -> None:
    """tests/test_golden.py resumes a real one."""
    check_as_begun("", RunConfig(), "config.toml")
    check_as_begun(dump_config(RunConfig()), RunConfig(), "config.toml")
