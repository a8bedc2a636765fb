"""results.json of a sweep: every number recomputed from the run folders and the files of items, nothing carried along.

Torch is imported only once there is something to compare.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tinylora.config.recipe import load_recipe
from tinylora.sweeps.plan import ITEMS, Cell, Choice, Run, Sweep
from tinylora.sweeps.state import RunState, untrained_key, validation
from tinylora.system.jsonl import finite_json, read_jsonl

FILE, VERSION = "results.json", 1
SCORES = ("strict", "value_only")


class Results:
    """Makes results.json; what a finished run says is computed once."""

    def __init__(self, sweep: Sweep, folder: Path) -> None:
        self.sweep, self.folder = sweep, folder
        self._runs: dict[str, dict[str, Any]] = {}
        self._summaries: dict[tuple[str, ...], dict[str, Any]] = {}
        self._correct: dict[str, dict[str, Any]] = {}
        self._untrained: dict[str, dict[str, Any]] = {}

    def gather(
        self,
        states: Mapping[str, RunState],
        choices: Mapping[str, tuple[Choice | None, list[dict[str, Any]]]],
    ) -> dict[str, Any]:
        """Everything that is known. `states` by a run's path; `choices` by cell: what was chosen, all candidates."""
        cells = [self._cell(cell, states, *choices[cell.name]) for cell in self.sweep.cells]
        runs = [run for cell in cells for run in cell["runs"]]
        failed = [
            {"run": path, "stage": state.failure.stage, "code": state.failure.code, "last_lines": state.failure.lines}
            for path, state in states.items()
            if state.failure is not None
        ]
        return {
            "version": VERSION,
            "recipe": self.sweep.name,
            "set": list(self.sweep.set),
            "num_items": self.sweep.num_items,
            "untrained": self._untrained,
            "cells": cells,
            "failed": failed,
            "not_run": [run["path"] for run in runs if run["state"] == "not run"],
        }

    def write(self, results: dict[str, Any]) -> Path:
        """Replace results.json, atomically."""
        from tinylora.system.files import write_atomically

        path = self.folder / FILE
        text = json.dumps(finite_json(results), indent=1, ensure_ascii=False) + "\n"
        write_atomically(path, text.encode("utf-8", errors="replace"))
        return path

    def _cell(
        self, cell: Cell, states: Mapping[str, RunState], chosen: Choice | None, candidates: list[dict[str, Any]]
    ) -> dict[str, Any]:
        # Before anything is chosen the runs that count have no name yet; they are listed under the first candidate's.
        runs = cell.runs(chosen if chosen is not None else cell.candidates()[0].chosen)
        config = self.sweep.config(runs[0])
        rows = []
        for run in runs:
            state = states.get(run.path) if chosen is not None else None
            row = self._run(run, state) if state is not None and state.evaluated else _bare(run, state)
            if chosen is None:
                row |= {"chosen": None, "path": f"cells/{cell.name}/seed-{run.seed}_projection-{run.projection_seed}"}
            rows.append({**row, "candidates": candidates})
        done = [run.path for run, row in zip(runs, rows, strict=True) if row["state"] == "done"]
        return {
            "name": cell.name,
            "set": list(cell.set),
            "method": config.method.name,
            "label": "tinylora" if config.method.name == "tinylora" else config.method.describe(),
            "algorithm": config.train.algorithm,
            "trained_numbers": next((row["trained_numbers"] for row in rows if row["state"] == "done"), None),
            "chosen": None if chosen is None else dict(chosen),
            "candidates": candidates,
            "runs": rows,
            "summary": self._summary(tuple(done)) if done else None,
        }

    def _run(self, run: Run, state: RunState) -> dict[str, Any]:
        if run.path in self._runs:
            return dict(self._runs[run.path])
        from tinylora.evaluation.items import read_items
        from tinylora.evaluation.plain import paired_json, share_json
        from tinylora.rollouts.replies import correct

        assert state.run is not None
        folder = state.run
        config = load_recipe(str(folder / "config.toml"))
        key = untrained_key(config, self.sweep.num_items)
        base, tuned = (read_items(state.folder / ITEMS, name) for name in ("untrained", "adapter"))
        self._correct[run.path] = {score: (correct(base, score), correct(tuned, score)) for score in SCORES}
        if key not in self._untrained:
            shares = {score: share_json(base, score) for score in SCORES}
            self._untrained[key] = {"model": config.model.name, "task": config.task.name, **shares}
        portable = folder / "adapter.tinylora"
        row = {
            **_bare(run, state),
            "run": folder.relative_to(self.folder).as_posix(),
            "items": (state.folder / ITEMS).relative_to(self.folder).as_posix(),
            "untrained": key,
            "trained_numbers": trained_numbers(folder / "adapter.safetensors"),
            "adapter_bytes": (folder / "adapter.safetensors").stat().st_size,
            "portable_bytes": portable.stat().st_size if portable.is_file() else None,
            "threads": config.train.num_threads,
            **cost(read_jsonl(folder / "metrics.jsonl"), config.grpo.group_size),
            "validation": validation(folder),
            **{score: paired_json(base, tuned, score) for score in SCORES},
        }
        self._runs[run.path] = row
        return dict(row)

    def _summary(self, paths: tuple[str, ...]) -> dict[str, Any]:
        """Over the runs of one cell, whatever their seed: shares of right items, and the difference pooled by item."""
        if paths not in self._summaries:
            from tinylora.evaluation.statistics.paired import pooled_result

            summary: dict[str, Any] = {"num_runs": len(paths)}
            for score in SCORES:
                pooled = pooled_result([self._correct[path][score] for path in paths])
                shares = [float(self._correct[path][score][1].mean()) for path in paths]
                summary[score] = {
                    **spread(shares),
                    "pooled": {
                        "won": pooled.won, "lost": pooled.lost, "p_value": pooled.p_value,
                        "difference": pooled.difference, "text": pooled.text(),
                        "interval": None if pooled.interval is None else list(pooled.interval),
                    },
                }  # fmt: skip
            self._summaries[paths] = summary
        return self._summaries[paths]


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, smallest, largest, and the sample standard deviation (n - 1), which one value does not have."""
    return {
        "mean": mean(values), "min": min(values), "max": max(values), "sd": stdev(values) if len(values) > 1 else None,
    }  # fmt: skip


def cost(metrics: Sequence[Mapping[str, Any]], group_size: int) -> dict[str, Any]:
    """What training took, from the lines of metrics.jsonl; None where they do not say."""
    from tinylora.evaluation.account import completions_sampled

    steps = [row for row in metrics if row.get("step")]

    def total(name: str) -> Any:
        return sum(row[name] for row in steps if row.get(name)) if any(name in row for row in steps) else None

    return {
        "steps": len(steps),
        "seconds": total("seconds"),
        "cpu_seconds": total("cpu_seconds"),
        "peak_memory_bytes": max((row["peak_memory_bytes"] for row in steps if row.get("peak_memory_bytes")),
                                 default=None),
        "samples": completions_sampled(steps, group_size),
        "tokens_sampled": total("tokens_sampled"),
    }  # fmt: skip


def trained_numbers(adapter: Path) -> int:
    """How many numbers an adapter file holds, from its header alone."""
    with adapter.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    count = 1
    for size in header["v"]["shape"]:
        count *= size
    return count


def _bare(run: Run, state: RunState | None) -> dict[str, Any]:
    word = state.word if state is not None else "not run"
    return {
        "cell": run.cell.name,
        "seed": run.seed,
        "projection_seed": run.projection_seed,
        "chosen": dict(run.chosen),
        "path": run.path,
        "state": word,
    }
