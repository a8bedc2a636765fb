"""What a file says of a gain is counted again from its items: a report and a card show no edited number."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_runs import make_run
from typer.testing import CliRunner

from tinylora.cli import app
from tinylora.errors import UserError
from tinylora.evaluation.recount import LACKS, paired_from_counts, recount_evidence, recount_result
from tinylora.interop.card import model_card
from tinylora.store.adapter import Adapter
from tinylora.store.adapter_file import load_vector

pytestmark = pytest.mark.usefixtures("undrawn")
RUNNER = CliRunner()


def edited(path: Path, edit: Callable[[Any], object]) -> None:
    told = json.loads(path.read_text())
    edit(told)
    path.write_text(json.dumps(told))


def at(*keys: Any, to: Any) -> Callable[[Any], None]:
    def edit(told: Any) -> None:
        for key in keys[:-1]:
            told = told[key]
        told[keys[-1]] = to

    return edit


LIES = {
    "p value": at("primary", "p_value", to=1e-9),
    "difference": at("primary", "difference", to=0.99),
    "interval": at("primary", "interval", to=[0.98, 1.0]),
    "won": at("primary", "won", to=8),
    "right ones": at("primary", "tuned", "correct", to=1),
    "value only": at("value_only", "p_value", to=1e-9),
    "sampled": at("sampled", "difference", to=0.99),
    "best prompt": at("best_prompt", "against_tuned", "p_value", to=1e-9),
    "best prompt's share": at("best_prompt", "correct", to=0),
    "larger budget": at("larger_budget", "against_tuned", "difference", to=0.9),
    "random": at("random", 0, "correct", to=0),
    "numbers": at("trained_numbers", to=1),
    "stopped": at("stopped", "tuned", to=0.123),
    "length": at("length", "tuned", to=1.5),
}


def card(run: Path) -> str:
    """As `tinylora card`, of a run whose base is not there."""
    v, config = load_vector(run)
    adapter = Adapter(label=str(run), v=v, config=config.adapter, run=config)
    return model_card(adapter, None, base_name=config.model.name, run=run)


@pytest.mark.parametrize("lie", LIES)
def test_an_edited_result_is_refused(tmp_path: Path, lie: str) -> None:
    run = make_run(tmp_path / "run", evidence=False)
    assert "greedy, strict (the measure declared beforehand)" in card(run)
    edited(run / "result.json", LIES[lie])
    done = RUNNER.invoke(app, ["report", str(run)])
    assert done.exit_code == 2 and str(run / "result.json") in done.stderr, (done.stdout, done.exception)
    with pytest.raises(UserError, match=re.escape(str(run / "result.json"))):
        card(run)


@pytest.mark.parametrize("file", ["result.json", "evidence.json"])
def test_the_verdict_and_the_sentences_are_made_anew(tmp_path: Path, file: str) -> None:
    run = make_run(tmp_path / "run", evidence=file == "evidence.json")
    before, card_before = RUNNER.invoke(app, ["report", str(run)]), card(run)
    lie = "+99.0 points, p = 1e-99"

    def edit(told: Any) -> None:
        told["verdict"] = lie
        for one in (told.get("primary"), told.get("value_only")):
            if one:
                one["text"] = lie

    edited(run / file, edit)
    after = RUNNER.invoke(app, ["report", str(run)])
    assert before.exit_code == after.exit_code == 0
    assert after.stdout == before.stdout and lie not in after.stdout and card(run) == card_before
    assert lie not in (run / "report.html").read_text()
    assert "is not what its items give" in after.stderr and "items give" not in before.stderr


@pytest.mark.parametrize(
    "lie",
    [
        at("conditions", 0, "against_tuned", "p_value", to=1e-9),
        at("conditions", 0, "against_tuned", "p_adjusted", to=1e-9),
        at("conditions", 0, "strict", "correct", to=0),
        at("gain", "value", to=0.9),
        at("value_only", "won", to=10**6),
        at("smallest_effect", "difference", to=0.001),
        at("num_items", to=10**6),
        at("trained_numbers", to=1),
    ],
)
def test_edited_evidence_is_refused(tmp_path: Path, lie: Callable[[Any], None]) -> None:
    run = make_run(tmp_path / "run")
    edited(run / "evidence.json", lie)
    done = RUNNER.invoke(app, ["report", str(run)])
    assert done.exit_code == 2 and str(run / "evidence.json") in done.stderr, (done.stdout, done.exception)


@pytest.mark.parametrize("lie", ["p value", "difference", "interval", "won", "right ones", "value only", "best prompt"])
def test_without_items_the_counts_count(tmp_path: Path, lie: str) -> None:
    run = make_run(tmp_path / "run", evidence=False)
    (run / "result_items.jsonl").unlink()
    told = json.loads((run / "result.json").read_text())
    again = recount_result(told, {})
    assert {key: value for key, value in again.items() if key != "restated"} == told and not again["restated"]
    LIES[lie](told)
    with pytest.raises(UserError, match="p_value|difference|interval|contradict|won"):
        recount_result(told, {})


def test_what_is_right_stays_as_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    told = json.loads((run / "evidence.json").read_text())
    again = recount_evidence(told, {})
    again.pop("restated")
    assert again == told


@pytest.mark.parametrize("told", [{}, {"primary": 1}, {"primary": {"base": None}}, {"conditions": [[]]}])
def test_damaged_files_are_told_from_others(told: dict[str, Any]) -> None:
    for recount in (recount_result, recount_evidence):
        with pytest.raises((UserError, *LACKS)):
            recount(told, {})


def test_counts_that_no_items_have() -> None:
    told: dict[str, Any] = {
        "base": {"correct": 3, "total": 8},
        "tuned": {"correct": 5, "total": 8},
        "won": 3,
        "lost": 1,
    }
    found = paired_from_counts("x", told)
    assert (found.won, found.lost, found.base.correct, found.tuned.correct, found.base.total) == (3, 1, 3, 5, 8)
    for key, value in (("won", 2), ("lost", 4), ("won", -1), ("won", 9)):
        with pytest.raises(UserError, match="contradict"):
            paired_from_counts("x", {**told, key: value})
