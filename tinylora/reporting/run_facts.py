"""What lies in a run's folder, read once, for the report. Missing files are None: it then says "not measured"."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylora.errors import UserError
from tinylora.reporting.metrics import read_jsonl

Items = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """One run as it lies on the disk."""

    path: Path
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    result: dict[str, Any] | None
    """result.json, the final evaluation of the run."""
    evidence: dict[str, Any] | None
    """evidence.json, all controls."""
    items: Items
    """Answers by condition: those of evidence_items.jsonl, else of result_items.jsonl."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that are steps; step 0 is the untrained model."""
        return [row for row in self.metrics if row.get("step")]

    @property
    def sides(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]] | None:
        """Greedy answers of the untrained model and of the adapter to the same items; None where there are none."""
        names = ("untrained", "tuned") if "tuned" in self.items else ("base_greedy", "tuned_greedy")
        if not all(name in self.items for name in names):
            return None
        base, tuned = (self.items[name] for name in names)
        if [row["item_id"] for row in base] != [row["item_id"] for row in tuned]:
            raise UserError(
                f"{self.path}: the untrained model and the adapter have answered other items; evaluate again"
            )
        return base, tuned


def read_run(path: Path) -> RunFacts:
    """Raises: UserError for a folder that is no run, a run without a step, or files that are no JSON."""
    from tinylora.training.recipe import to_table
    from tinylora.training.run_folder import RunFolder

    folder = RunFolder.open(path)
    config = folder.read_config()
    metrics = read_jsonl(folder.metrics_path)
    if not any(row.get("step") for row in metrics):
        raise UserError(f"{path} has no finished step yet, so there is nothing to report; wait, or train --resume it")
    evidence = _json(path / "evidence.json")
    items = _items(path / "evidence_items.jsonl") if evidence else _items(path / "result_items.jsonl")
    return RunFacts(
        path=path,
        config=to_table(config),
        config_text=folder.config_path.read_text(encoding="utf-8"),
        environment=_json(folder.environment_path) or {},
        metrics=metrics,
        result=_json(path / "result.json"),
        evidence=evidence,
        items=items,
    )


def shared_items(runs: Sequence[RunFacts]) -> bool:
    """Whether all runs were evaluated on the same items with the same base and task, to be pooled over seeds."""
    sides = [run.sides for run in runs]
    if len(runs) < 2 or any(side is None for side in sides):
        return False
    keys = {json.dumps([run.config["model"]["name"], run.config["task"]], sort_keys=True, default=str) for run in runs}
    ids = {tuple(row["item_id"] for row in side[1]) for side in sides if side is not None}
    seeds = {(run.config["train"]["seed"], run.config["adapter"]["seed"]) for run in runs}
    return len(keys) == len(ids) == 1 and len(seeds) == len(runs)


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it, or make it again with: tinylora eval") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} must be a JSON object, got {type(found).__name__}; make it again with: tinylora eval")
    return found


def _items(path: Path) -> Items:
    items: Items = {}
    for row in read_jsonl(path):
        items.setdefault(str(row.get("condition")), []).append(row)
    return items
