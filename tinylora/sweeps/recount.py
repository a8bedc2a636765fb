"""results.json of a sweep counted again before it is drawn: from the items and adapters beside it where they are,
else from its own counts. A file that says otherwise is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinylora.errors import UserError
from tinylora.evaluation.recount import by_condition, recount_pair, recount_share
from tinylora.sweeps.results import SCORES, trained_numbers
from tinylora.system.jsonl import read_jsonl


def recounted(path: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """The results with all that a figure shows computed. Raises: UserError where the file says otherwise."""
    try:
        untrained = {key: dict(one) for key, one in results["untrained"].items()}
        cells = [{**cell, "runs": [_run(path, run, untrained) for run in cell["runs"]]} for cell in results["cells"]]
        for key, one in untrained.items():
            one.update({score: recount_share(f"untrained {key}", one[score], [], score) for score in SCORES})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return {**results, "untrained": untrained, "cells": cells}


def _run(path: Path, run: dict[str, Any], untrained: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if run["state"] != "done":
        return run
    file = _beside(path, run.get("items"))
    rows = by_condition(read_jsonl(file)) if file is not None else {}
    base, tuned = rows.get("untrained", []), rows.get("adapter", [])
    found = dict(run)
    for score in SCORES:
        told, what = run[score], f"{run['path']}, {score}"
        found[score] = {**told, "tuned": recount_share(what, told["tuned"], tuned, score)}
        if "won" in told:  # files of other makers may have the counts alone
            found[score] = recount_pair(what, told, base, tuned, score)
        if (whole := untrained.get(run["untrained"])) is None:
            continue
        whole[score] = recount_share(f"untrained {run['untrained']}", whole[score], base, score)
    adapter = _beside(path, f"{run['run']}/adapter.safetensors" if run.get("run") else None)
    if adapter is not None and (count := trained_numbers(adapter)) != run["trained_numbers"]:
        raise UserError(f"{run['path']} has {run['trained_numbers']} trained numbers there, and {count} in {adapter}")
    return found


def _beside(path: Path, name: object) -> Path | None:
    """A file below the folder of `path`; None for one that is not there, or lies elsewhere."""
    if not isinstance(name, str) or not name:
        return None
    folder = path.parent.resolve()
    file = (folder / name).resolve()
    return file if file.is_relative_to(folder) and file.is_file() else None
