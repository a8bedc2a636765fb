"""The facts of a run, read once from its folder, and what several runs have in common. Missing files are None.

Leaves out: drawing (figures, charts) and writing (page). Nothing here needs torch or the model.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from tinylora.adapter.code import to_code
from tinylora.config.algorithms import ALGORITHMS
from tinylora.config.resume import check_as_begun
from tinylora.config.run import RunConfig
from tinylora.config.schema import to_table
from tinylora.errors import UserError
from tinylora.evaluation.statistics.paired import PooledResult, pooled_result
from tinylora.reporting.outcomes import Evaluation, read_evaluation
from tinylora.reporting.run_files import read_json
from tinylora.reporting.samples import shown
from tinylora.store.run_folder import SKIPPED, RunFolder
from tinylora.system.jsonl import read_jsonl
from tinylora.talk import shell_line

POOLED_MEASURES = ("strict", "value_only")
_SEEDS_AND_MACHINE = {
    "train.seed", "adapter.seed", "model.device", "train.num_threads", "train.micro_batch_tokens",
    "train.memory_budget_gib", "train.gradient_checkpointing", "train.liveness_every", "generation.backend",
    "generation.max_batch_rows", "generation.kv_budget_gib", "generation.cuda_graphs",
}  # fmt: skip
"""Settings that may differ between runs that are pooled: seeds, and where and how fast it was computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """What the adapter's files say; empty or None where they do not."""

    step: int | None
    """After which step v was taken."""
    fingerprint: str
    """Of the base."""
    num_bytes: int | None
    """Of the portable file."""
    num_trained: int | None
    code: str
    """The same as text, where it is short enough for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """One run as it lies on the disk."""

    label: str
    """Its folder's name, or its path where names repeat."""
    path: Path
    config: RunConfig
    config_text: str
    environment: Mapping[str, Any]
    metrics: tuple[dict[str, Any], ...]
    """Every line; that of step 0, if there is one, holds the untrained model's validation."""
    adapter: AdapterFile
    skipped: tuple[dict[str, Any], ...]
    """Items that task.skip left out: split, item, question, why."""
    evaluation: Evaluation | None
    account: Mapping[str, Mapping[str, Any]]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of training steps."""
        return [row for row in self.metrics if row["step"] > 0]

    @property
    def num_trained(self) -> int | None:
        """How many numbers were trained; None for a run without an adapter that logs no numbers."""
        return len(self.v) or self.adapter.num_trained

    @property
    def algorithm(self) -> str:
        """How it learned, in words."""
        return ALGORITHMS[self.config.train.algorithm].in_words

    @property
    def v(self) -> list[float | None]:
        """The numbers after the last step."""
        found = self.steps[-1].get("v")
        return [finite(x) for x in found] if isinstance(found, list) else []

    @property
    def kept_v(self) -> list[float | None]:
        """The numbers of the adapter: those after the step at which it was taken; empty where that is not known."""
        rows = [row for row in self.steps if row["step"] == self.adapter.step and isinstance(row.get("v"), list)]
        return [finite(x) for x in rows[-1]["v"]] if rows else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Runs that differ in seeds alone, on the same items."""

    labels: tuple[str, ...]
    repeated: tuple[str, ...]
    """Runs that repeat the seeds of another one and are left out: the same run again is no new evidence."""
    results: Mapping[str, PooledResult]
    """By measure."""


def read_runs(paths: Sequence[Path]) -> list[RunFacts]:
    """The facts of several runs, with labels that tell them apart.

    Raises: UserError for a folder given twice, and as `read_run`.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"every run can be named once, got {', '.join(map(str, paths))}")
    names = [shown(path.resolve().name, 100) for path in paths]
    labels = names if len(set(names)) == len(names) else [shown(str(path), 1000) for path in paths]
    return [read_run(path, label) for path, label in zip(paths, labels, strict=True)]


def read_run(path: Path, label: str) -> RunFacts:
    """The facts of one run.

    Raises: UserError for a folder that is no run, a run without a finished step, or files that contradict each other.
    """
    folder = RunFolder.open(path)
    config = folder.read_config()
    metrics = [row for row in read_jsonl(folder.metrics_path) if isinstance(row.get("step"), int)]
    if not any(row["step"] > 0 for row in metrics):
        raise UserError(
            f"{path} has no finished step, so there is nothing to report; go on with: "
            + shell_line("tinylora", "train", "--resume", path)
        )
    _check_settings(path, config)
    evaluation = read_evaluation(path)
    account = dict(evaluation.account) if evaluation is not None else {}
    return RunFacts(
        label=label,
        path=path,
        config=config,
        config_text=folder.config_path.read_text(encoding="utf-8"),
        environment=read_json(folder.environment_path) or {},
        metrics=tuple(metrics),
        adapter=_adapter_file(path),
        skipped=tuple(read_jsonl(path / SKIPPED)) if (path / SKIPPED).is_file() else (),
        evaluation=evaluation,
        account=account if "training" in account else {"training": _training_account(metrics), **account},
    )


def _check_settings(run: Path, config: RunConfig) -> None:
    """Raises: UserError if config.toml is not what the run's adapter was trained under, by the adapter's own word."""
    try:
        with safe_open(run / "adapter.safetensors", framework="numpy") as handle:
            began = str((handle.metadata() or {}).get("config", ""))
    except (SafetensorError, OSError):
        return  # no adapter yet, or none that can be read
    check_as_begun(began, config, str(run / "config.toml"))


def finite(value: Any) -> float | None:
    """A number as a float; None for what is missing, no number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def pools(runs: Sequence[RunFacts]) -> list[Pool]:
    """Groups of two runs or more with the same base, task, settings and test items, in the order of the runs."""
    groups: dict[str, list[RunFacts]] = {}
    for run in runs:
        if run.evaluation is not None and run.evaluation.sides is not None:
            groups.setdefault(_pooling_key(run), []).append(run)
    found = []
    for group in groups.values():
        first: dict[tuple[int, int], str] = {}
        for run in group:
            first.setdefault((run.config.train.seed, run.config.adapter.seed), run.label)
        if len(first) > 1:
            kept = [run for run in group if run.label in first.values()]
            found.append(_pool(kept, [run.label for run in group if run.label not in first.values()]))
    return found


def differing_settings(runs: Sequence[RunFacts]) -> list[tuple[str, list[Any]]]:
    """(dotted key, its value in each run) of every setting in which the runs differ."""
    flat = [_flat(to_table(run.config)) for run in runs]
    keys = dict.fromkeys(key for table in flat for key in table)
    rows = [(key, [table.get(key) for table in flat]) for key in keys if not key.startswith("log.")]
    return [(key, values) for key, values in rows if len({repr(value) for value in values}) > 1]


def _pooling_key(run: RunFacts) -> str:
    assert run.evaluation is not None and run.evaluation.sides is not None
    settings = {
        key: value
        for key, value in _flat(to_table(run.config)).items()
        if key not in _SEEDS_AND_MACHINE and not key.startswith(("log.", "eval."))
    }
    items = sorted(str(row["item_id"]) for row in run.evaluation.sides[0])
    # The protocol too: an evaluation may have asked the same questions in another way.
    return json.dumps([settings, items, run.evaluation.protocol], sort_keys=True, default=str)


def _pool(runs: Sequence[RunFacts], repeated: Sequence[str]) -> Pool:
    results = {}
    for measure in POOLED_MEASURES:
        pairs = []
        for run in runs:
            assert run.evaluation is not None and run.evaluation.sides is not None
            # Sorted by item: pooling needs one order, and the files may have several.
            sides = [sorted(side, key=lambda row: str(row["item_id"])) for side in run.evaluation.sides]
            base, tuned = (np.array([float(row[measure]) >= 1 for row in side]) for side in sides)
            pairs.append((base, tuned))
        results[measure] = pooled_result(pairs)
    return Pool(labels=tuple(run.label for run in runs), repeated=tuple(repeated), results=results)


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        found |= _flat(value, f"{key}.") if isinstance(value, Mapping) and value else {key: value}
    return found


def _adapter_file(run: Path) -> AdapterFile:
    facts: Mapping[str, Any] = {}
    num_trained = None
    try:
        with safe_open(run / "adapter.safetensors", framework="numpy") as handle:
            num_trained = math.prod(handle.get_slice("v").get_shape())
            found = json.loads((handle.metadata() or {}).get("facts", "{}"))
        facts = found if isinstance(found, dict) else {}
    except (SafetensorError, OSError, ValueError):
        pass  # not there, or not readable: then nothing is said about it
    try:
        data = (run / "adapter.tinylora").read_bytes()
    except OSError:
        data = b""
    try:
        code = to_code(data) if data else ""
    except UserError:  # too long for a code
        code = ""
    step = facts.get("step")
    return AdapterFile(
        step=step if isinstance(step, int) else None,
        fingerprint=str(facts.get("fingerprint", "")),
        num_bytes=len(data) or None,
        num_trained=num_trained,
        code=code,
    )


def _training_account(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the run itself counted; what only `eval --controls` computes is left out."""
    steps = [row for row in metrics if row["step"] > 0]

    def total(name: str) -> float | None:
        values = [value for row in steps if (value := finite(row.get(name))) is not None]
        return sum(values) if values else None

    cpu_seconds = total("cpu_seconds")
    peaks = [int(peak) for row in steps if (peak := finite(row.get("peak_memory_bytes")))]
    counts = {name: total(name) for name in ("tokens_sampled", "prompt_tokens", "tokens_trained")}
    return {
        **{name: None if count is None else int(count) for name, count in counts.items()},
        "seconds": total("seconds"),
        "cpu_hours": None if cpu_seconds is None else cpu_seconds / 3600,
        "peak_memory_bytes": max(peaks, default=None),
    }
