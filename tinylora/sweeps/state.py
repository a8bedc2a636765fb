"""What is there of each run: read from its folder, so that a sweep goes on wherever it was stopped.

FOLDER/cells/CELL/seed-0_projection-0_lr-0.004/
  demo-001/        the run folder that `tinylora train` made
  state.json       what has ended: trained, evaluated, or failed with the last lines of the output
  items.jsonl      every reply of the untrained model and the adapter to the test items
  talk.txt         what the children said
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinylora.config.recipe import load_recipe
from tinylora.config.run import RunConfig
from tinylora.config.schema import to_table
from tinylora.sweeps.plan import ITEMS, Choice, Run
from tinylora.system.jsonl import read_jsonl

TALK, STATE = "talk.txt", "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A child that ended with an error."""

    stage: str
    """training or evaluation."""
    code: int
    lines: tuple[str, ...]
    """The last ones of its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """One run, as its folder says."""

    folder: Path
    run: Path | None
    """The run folder, if training has begun."""
    trained: bool = False
    evaluated: bool = False
    train_seconds: float | None = None
    """Wall time of the process that trained it; of the last one, if it was stopped and went on."""
    eval_seconds: float | None = None
    failure: Failure | None = None

    @property
    def word(self) -> str:
        """One word or two, for people and results.json."""
        if self.failure is not None:
            return "failed"
        return "done" if self.evaluated else "trained" if self.trained else "half trained" if self.run else "not run"


def read_state(folder: Path) -> RunState:
    """What the folder of one run holds; of a folder that is not there, nothing."""
    run = next((path.parent for path in sorted(folder.glob("*/config.toml"))), None)
    try:
        stored = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored = {}
    has_adapter = run is not None and (run / "adapter.safetensors").is_file()
    trained = bool(stored.get("trained")) and has_adapter
    failed = stored.get("failed")
    return RunState(
        folder=folder, run=run, trained=trained,
        evaluated=trained and bool(stored.get("evaluated")) and (folder / ITEMS).is_file(),
        train_seconds=stored.get("train_seconds"), eval_seconds=stored.get("eval_seconds"),
        failure=Failure(stage=failed["stage"], code=failed["code"], lines=tuple(failed["lines"])) if failed else None,
    )  # fmt: skip


def write_state(state: RunState) -> RunState:
    """Keep what has ended, atomically; gives the state as the folder now says it."""
    from tinylora.system.files import write_atomically

    failed = state.failure and {"stage": state.failure.stage, "code": state.failure.code, "lines": state.failure.lines}
    table = {
        "trained": state.trained, "evaluated": state.evaluated, "train_seconds": state.train_seconds,
        "eval_seconds": state.eval_seconds, "failed": failed,
    }  # fmt: skip
    write_atomically(state.folder / STATE, (json.dumps(table, indent=1) + "\n").encode())
    return replace(read_state(state.folder), failure=state.failure)


# --- the choice by validation ---


def validation(run: Path) -> dict[str, Any] | None:
    """Validation of the step whose numbers a run keeps: step, reward, strict, value_only; None if it has none."""
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if row.get("step") and "validation_reward" in row]
    if not rows:
        return None
    keep = load_recipe(str(run / "config.toml")).train.keep
    # The first of the best, as the training loop keeps it.
    kept = rows[-1] if keep == "last" else max(rows, key=lambda row: (row["validation_reward"], -row["step"]))
    names = ("reward", "strict", "value_only")
    return {"step": kept["step"], **{name: kept[f"validation_{name}"] for name in names}}


def choose(candidates: Sequence[Run], states: Sequence[RunState]) -> tuple[Choice | None, list[dict[str, Any]]]:
    """The values whose run has the best validation reward, and what every candidate had; the test is not looked at.

    Of equals the first as they are written. A candidate that failed cannot be chosen; None where all did.
    """
    rows: list[dict[str, Any]] = []
    best: tuple[float, Choice] | None = None
    for candidate, state in zip(candidates, states, strict=True):
        score = validation(state.run) if state.trained and state.run is not None else None
        rows.append(
            {"values": dict(candidate.chosen), "state": "trained" if score else state.word, "validation": score}
        )
        if score is not None and (best is None or score["reward"] > best[0]):
            best = score["reward"], candidate.chosen
    return (best[1] if best else None), rows


# --- whose replies are whose partner ---


def untrained_key(config: RunConfig, num_items: int) -> str:
    """A name for the untrained model's replies: equal for runs that share base, task, prompt and budget."""
    table = to_table(config)
    table["model"].pop("trust_remote_code")
    generation = {name: table["generation"][name] for name in ("backend", "max_new_tokens", "stop_strings")}
    told = [table["model"], table["task"], table["prompt"], generation, num_items]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
