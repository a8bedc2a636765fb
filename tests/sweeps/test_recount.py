"""The figure of a sweep is of its items: an edited results.json is not drawn."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinylora.errors import UserError
from tinylora.sweeps.recount import recounted

STUDIES = Path(__file__).parents[2] / "bench" / "results" / "studies"


def score(item: str, value: float) -> dict[str, Any]:
    return {"item_id": item, "strict": value, "value_only": value}


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    """One run of 4 items: 1 of 4 untrained, 3 of 4 trained, and its items beside it."""
    lines = [{"condition": "untrained", **score(str(i), float(i == 0))} for i in range(4)]
    lines += [{"condition": "adapter", **score(str(i), float(i != 3))} for i in range(4)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pair = {
        "base": {"correct": 1, "total": 4}, "tuned": {"correct": 3, "total": 4}, "won": 2, "lost": 0, "p_value": 0.5,
        "difference": 0.5, "interval": [-0.13577, 0.77346], "text": "?",
    }  # fmt: skip
    share = {"correct": 1, "total": 4}
    run = {"state": "done", "path": "a", "items": "items.jsonl", "untrained": "u", "trained_numbers": 3,
           "strict": pair, "value_only": pair}  # fmt: skip
    from tinylora.evaluation.recount import paired_from_counts

    pair["interval"] = list(paired_from_counts("x", pair).interval)
    return {"untrained": {"u": {"strict": share, "value_only": share}}, "cells": [{"name": "c", "runs": [run]}]}


def change(*keys: Any, to: Any) -> Callable[[Any], None]:
    def edit(told: Any) -> None:
        for key in keys[:-1]:
            told = told[key]
        told[keys[-1]] = to

    return edit


RUN = ("cells", 0, "runs", 0)


@pytest.mark.parametrize(
    "lie",
    [
        change(*RUN, "strict", "tuned", "correct", to=4),
        change(*RUN, "value_only", "won", to=3),
        change(*RUN, "strict", "p_value", to=1e-9),
        change("untrained", "u", "strict", "correct", to=0),
    ],
)
@pytest.mark.parametrize("has_items", [True, False])
def test_what_the_items_do_not_say_is_refused(
    results: dict[str, Any], tmp_path: Path, lie: Callable[[Any], None], has_items: bool
) -> None:
    path = tmp_path / "results.json"
    told = json.loads(json.dumps(results))
    recounted(path, told)
    if not has_items:
        (tmp_path / "items.jsonl").unlink()
        if told["untrained"]["u"]["strict"]["correct"] == 1:  # without items a share stands for itself
            change("untrained", "u", "strict", "interval", to=[0.0, 0.1])(told)
    lie(told)
    with pytest.raises(UserError, match="items say|contradict"):
        recounted(path, told)


def test_items_elsewhere_are_not_read(results: dict[str, Any], tmp_path: Path) -> None:
    inner = tmp_path / "sweep"
    inner.mkdir()
    results["cells"][0]["runs"][0]["items"] = "../items.jsonl"
    (tmp_path / "items.jsonl").write_text("not read")
    assert recounted(inner / "results.json", results)["cells"][0]["runs"][0]["strict"]["won"] == 2


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.json")), ids=lambda path: path.stem)
def test_published_results_hold(path: Path) -> None:
    told = json.loads(path.read_text())
    if "cells" in told and "untrained" in told:
        again = recounted(path, told)
        assert json.dumps(again["cells"]) == json.dumps(told["cells"])
