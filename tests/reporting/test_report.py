"""The report's numbers: every one against the items, by other code; and what is said where something is missing."""

import csv
import json
from pathlib import Path
from statistics import NormalDist

import pytest
from report_page import by_condition, expected_numbers, gain_again, pair_again, report, right, share_again, words
from report_runs import make_run, read_lines, write_lines
from statsmodels.stats.multitest import multipletests
from tiny_run import ByteTask, start

from tinylora.errors import UserError
from tinylora.reporting.outcomes import read_evaluation
from tinylora.reporting.page import NOT_EVALUATED, write_report


@pytest.mark.usefixtures("undrawn")
def test_every_number_on_the_page_can_be_computed_again_from_the_items(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo-001")
    page, done = report(run)
    expected = expected_numbers(run)
    expected["smallest.difference"] = page.value("smallest.difference", "demo-001")
    for key, value in expected.items():
        assert value is not None
        assert page.value(key, "demo-001") == pytest.approx(value, rel=1e-9, abs=1e-12), key
        assert page.numbers["demo-001", key][0] == words(key, value), key
    # The smallest effect solves Connor's equation.
    d, share, n = (expected[key] for key in ("smallest.difference", "smallest.discordant", "num_items"))
    assert d is not None and share is not None and n is not None
    z = NormalDist().inv_cdf
    assert n**0.5 * d == pytest.approx(z(0.975) * share**0.5 + z(0.8) * (share - d * d) ** 0.5, rel=1e-6)

    # What cannot be computed again is what evidence.json tells: side effects and cost.
    told = json.loads((run / "evidence.json").read_text())
    side = told["side_effects"]
    rest = {key for _, key in page.numbers} - set(expected)
    for who, account in told["account"].items():
        for name, value in account.items():
            if name != "prices":
                assert page.value(f"account.{who}.{name}", "demo-001") == value
                rest.remove(f"account.{who}.{name}")
    for name in ("kl_per_token", "num_tokens"):
        assert page.value(f"side.{name}", "demo-001") == side[name]
        rest.remove(f"side.{name}")
    for name in ("perplexity", "length", "repetition"):
        for model in ("base", "tuned"):
            assert page.value(f"side.{name}.{model}", "demo-001") == side[name][model]
            rest.remove(f"side.{name}.{model}")
    assert all(key.startswith("side.gsm8k.") for key in rest), rest
    assert page.value("side.gsm8k.strict.difference", "demo-001") == side["tasks"][0]["strict"]["difference"]
    assert "not measured" not in page.numbers["demo-001", "account.training.money"][0]
    assert page.numbers["demo-001", "account.controls.money"][0] == "not measured"
    assert told["verdict"].split(". ")[0] in done.verdict and "% interval" in done.verdict

    with (done.files / "numbers.csv").open(newline="") as file:
        rows = {(row["run"], row["key"]): (row["text"], row["value"]) for row in csv.DictReader(file)}
    assert rows == page.numbers


@pytest.mark.usefixtures("undrawn")
def test_the_check_above_can_fail(tmp_path: Path) -> None:
    """One item changed in the file, after the page was made, moves the expectation away from the page."""
    run = make_run(tmp_path / "demo-001")
    page, _ = report(run)
    rows = read_lines(run / "evidence_items.jsonl")
    row = next(row for row in rows if row["condition"] == "tuned" and row["strict"] == 1)
    row["strict"] = 0.0
    write_lines(run / "evidence_items.jsonl", rows)
    expected = expected_numbers(run)
    wrong = [key for key, value in expected.items() if page.value(key, "demo-001") != pytest.approx(value, rel=1e-9)]
    assert {"tuned.strict.share", "paired.strict.p", "random_0.against.difference", "gain.total"} <= set(wrong)
    with pytest.raises(UserError, match=r"evidence\.json: it says .* for .*, its items say "):
        write_report([run])


@pytest.mark.usefixtures("undrawn")
def test_without_evidence_the_numbers_are_those_of_the_final_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo-001", evidence=False)
    page, done = report(run)
    items = by_condition(run / "result_items.jsonl")
    names = {"untrained": "base_greedy", "tuned": "tuned_greedy", "best_prompt": "base_best_prompt",
             "larger_budget": "base_larger_budget", **{f"random_{i}": f"random_{i}" for i in range(5)}}  # fmt: skip
    p_values = []
    for name, condition in names.items():
        again = share_again(items[condition], "strict")
        assert page.value(f"{name}.strict.share", "demo-001") == pytest.approx(again["share"])
        assert page.value(f"{name}.strict.low", "demo-001") == pytest.approx(again["low"])
        if name != "tuned":
            pair = pair_again(right(items[condition]), right(items["tuned_greedy"]))
            assert page.value(f"{name}.against.lost", "demo-001") == pair["lost"]
            p_values.append((name, pair["p"]))
    adjusted = multipletests([p for _, p in p_values], method="fdr_bh")[1]
    for (name, _), p in zip(p_values, adjusted, strict=True):
        assert page.value(f"{name}.against.p_adjusted", "demo-001") == pytest.approx(p, rel=1e-9)
    again = gain_again(items["base_greedy"], items["tuned_greedy"])
    assert page.value("gain.value", "demo-001") == pytest.approx(again["value"], abs=1e-12)
    steps = read_lines(run / "metrics.jsonl")[1:]
    assert page.value("account.training.tokens_sampled", "demo-001") == sum(row["tokens_sampled"] for row in steps)
    assert page.value("account.training.cpu_hours", "demo-001") == pytest.approx(40 * 4.75 / 3600)
    assert page.numbers["demo-001", "account.training.flops"] == ("not measured", "")
    assert f"tinylora eval {run} --controls" in page.text
    for missing in (
        "v = 0 through",
        "the best of many random vectors",
        "one constant reply",
        "side effects on neutral",
    ):
        assert missing in page.text
    assert done.verdict == json.loads((run / "result.json").read_text())["verdict"]

    # Without its items the same page has the counts that result.json tells, and what they do not give is not measured.
    before = {key: page.value(key, "demo-001") for _, key in page.numbers}
    (run / "result_items.jsonl").unlink()
    page, _ = report(run)
    for key in (
        "tuned.strict.share",
        "paired.strict.p",
        "paired.value_only.difference",
        "sampled.strict.p",
        "tuned.length",
    ):
        assert page.value(key, "demo-001") == pytest.approx(before[key]), key
    assert page.numbers["demo-001", "tuned.repetition"] == ("not measured", "")
    assert ("demo-001", "gain.total") not in page.numbers and ("demo-001", "random_0.against.lost") not in page.numbers


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_was_not_evaluated_has_curves_only(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run-001", evidence=False, result=False, steps=3)
    lines = read_lines(run / "metrics.jsonl")
    write_lines(run / "metrics.jsonl", lines[:3])  # stopped after two of three steps
    (run / "adapter.safetensors").unlink()
    (run / "environment.json").unlink()
    page, done = report(run)
    assert done.verdict == NOT_EVALUATED and NOT_EVALUATED in page.text
    assert "Not finished: 2 of 3 steps" in page.text
    assert ("run-001", "tuned.strict.share") not in page.numbers
    assert {"strict", "value_only", "paths", "norm"} <= {path.stem for path in done.files.glob("*.png")}
    assert not (done.files / "conditions.png").exists()
    assert page.value("v.2", "run-001") == lines[2]["v"][1]


def test_a_real_run_and_its_report(tmp_path: Path, tiny_folder: Path, fresh_cache: Path) -> None:
    """Not our synthetic files but those that training writes."""
    done = start(tiny_folder, tmp_path / "runs", task=ByteTask(size=12), train={"steps": 2},
                 eval={"num_test": 12, "random_vectors": 1})  # fmt: skip
    page, made = report(done.run)
    items = by_condition(done.run / "result_items.jsonl")
    assert page.value("tuned.strict.correct", "run-001") == sum(row["strict"] >= 1 for row in items["tuned_greedy"])
    assert page.value("v_norm", "run-001") == pytest.approx(float(done.v.norm()), rel=1e-5)
    assert page.value("adapter_bytes", "run-001") == (done.run / "adapter.tinylora").stat().st_size
    assert 'tinylora.load_adapter(model, "TINY-' in page.text
    assert made.verdict == (done.result or {})["verdict"]


def test_what_a_run_says_of_itself(tmp_path: Path) -> None:
    """The facts without a page: the report is a thin layer over these."""
    run = make_run(tmp_path / "demo-001", num_items=12, steps=2)
    evaluation = read_evaluation(run)
    assert evaluation is not None and evaluation.protocol == "1f" * 8
    assert evaluation.not_run == () and evaluation.temperature == 0.6
    assert [one.name for one in evaluation.outcomes][:3] == ["untrained", "tuned", "zero"]
    assert evaluation.outcome("nonsense") is None
    (run / "evidence_items.jsonl").unlink()
    bare = read_evaluation(run)
    assert bare is not None and bare.sides is None and bare.items_file == ""
    assert bare.paired["strict"] == evaluation.paired["strict"]
    assert read_evaluation(tmp_path) is None
