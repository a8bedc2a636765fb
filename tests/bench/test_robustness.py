"""bench/trust/robustness.py: a wrong outcome, a traceback and a hang are each seen, and what is right is not."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(not (ROOT / "bench").exists(), reason="bench/ comes with the repository alone"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="its children are forked, or have process groups"),
]
STUB = """
import os, signal, sys, time
match sys.argv[1]:
    case "fine": print("done")
    case "refuses": print("tinylora: 7 is too many; take 3", file=sys.stderr); sys.exit(2)
    case "breaks": 1 / 0
    case "prints": print("Traceback (most recent call last):", file=sys.stderr)
    case "fails": sys.exit(1)
    case "dies": os.kill(os.getpid(), signal.SIGSEGV)
    case "hangs": time.sleep(600)
    case "writes": print("東")
"""


def rows(tmp_path: Path, trial: Callable[[Any], None], fresh: bool = True) -> dict[str, Any]:
    """The row of one input whose trial this is; `t.stub(what)` runs the program above in a child."""
    from bench.trust.robustness_cases.inputs import Input, Judge

    def with_stub(t: Any) -> None:
        t.write("stub.py", STUB)
        t.stub = lambda what, **more: t.run(what, program="stub", limit_seconds=more.pop("limit", 60.0), **more)
        trial(t)

    judge = Judge(tmp_path, fresh=fresh)
    judge.world.warm_up = lambda: None  # type: ignore[method-assign]
    [row] = judge.rows([Input("a name", "what is right", with_stub)])
    return row


@pytest.mark.parametrize("fresh", [True, False])
def test_what_is_right_is_right(tmp_path: Path, fresh: bool) -> None:
    def trial(t: Any) -> None:
        t.done(t.stub("fine"))
        t.refused(t.stub("refuses"), "too many", ("take 3", "take 4"))

    row = rows(tmp_path, trial, fresh)
    assert (row["verdict"], row["traceback"], row["hung"], row["codes"]) == ("right", False, False, [0, 2])


@pytest.mark.parametrize(
    ("trial", "why"),
    [
        (lambda t: t.refused(t.stub("fine")), "exit code 0, not 2"),
        (lambda t: t.done(t.stub("refuses")), "exit code 2, not 0"),
        (lambda t: t.refused(t.stub("refuses"), "too few"), "does not say 'too few'"),
        (lambda t: t.check(False, "another thing"), "another thing"),
        (lambda t: (t.folder / "nowhere").read_text(), "FileNotFoundError"),
        (lambda t: t.refused(t.stub("refuses"), within_gb=1e-6), "GB to say so"),
    ],
)
def test_another_outcome_is_wrong(tmp_path: Path, trial: Callable[[Any], None], why: str) -> None:
    row = rows(tmp_path, trial)
    assert row["verdict"] == "wrong" and why in row["why"] and not row["traceback"]


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("what", ["breaks", "prints", "fails", "dies"])
def test_tracebacks_signals_and_code_1_are_counted_though_nobody_asked(tmp_path: Path, what: str, fresh: bool) -> None:
    row = rows(tmp_path, lambda t: t.stub(what), fresh)
    assert row["traceback"] and row["verdict"] == "wrong"


def test_code_1_that_was_asked_for_is_none(tmp_path: Path) -> None:
    row = rows(tmp_path, lambda t: t.stub("fails", may_fail=True))
    assert not row["traceback"] and row["verdict"] == "right"


@pytest.mark.parametrize("fresh", [True, False])
def test_a_hang_is_ended_and_wrong(tmp_path: Path, fresh: bool) -> None:
    row = rows(tmp_path, lambda t: t.done(t.stub("hangs", limit=1.0)), fresh)
    assert row["hung"] and row["verdict"] == "wrong" and "no end after" in row["why"]
    assert row["seconds"] < 60


def test_a_hang_that_nobody_asked_about_is_wrong(tmp_path: Path) -> None:
    assert rows(tmp_path, lambda t: t.stub("hangs", limit=1.0))["verdict"] == "wrong"


@pytest.mark.parametrize("fresh", [True, False])
def test_a_child_has_the_encoding_that_it_was_given(tmp_path: Path, fresh: bool) -> None:
    row = rows(tmp_path, lambda t: t.stub("writes", env={"PYTHONIOENCODING": "ascii"}), fresh)
    assert row["traceback"]
    assert (
        rows(tmp_path, lambda t: t.done(t.stub("writes", env={"PYTHONIOENCODING": "utf-8"})), fresh)["verdict"]
        == "right"
    )


def test_a_trial_that_is_not_allowed_here_is_skipped(tmp_path: Path) -> None:
    from bench.trust.robustness_cases.inputs import Skip

    def trial(t: Any) -> None:
        raise Skip("no root")

    row = rows(tmp_path, trial)
    assert (row["verdict"], row["why"]) == ("skipped", "no root")


def test_scores_are_compared_and_a_child_that_ends_is_charged_to_one_input(tmp_path: Path, monkeypatch: Any) -> None:
    from bench.trust.robustness_cases import scoring
    from bench.trust.robustness_cases.inputs import Input, Score

    child = """
import json, os, sys
for line in open(sys.argv[1]):
    job = json.loads(line)
    if job["reply"] == "dies":
        os._exit(1)
    answer = {"refused": "no number"} if job["reply"] == "refused" else {"scores": {"strict": 1.0, "value_only": 0.0}}
    print("@" + json.dumps({"number": job["number"], **answer}), flush=True)
"""
    monkeypatch.setattr(scoring, "CHILD", child)
    asked = [("a", 1.0), ("b", 0.0), ("refused", None), ("refused", 1.0), ("dies", 1.0), ("c", None), ("d", 1.0)]
    inputs = [Input(f"{n}", "", score=Score("number", "1", reply, strict)) for n, (reply, strict) in enumerate(asked)]
    found = list(scoring.score_all(inputs, tmp_path))
    assert [row["verdict"] for row in found] == ["right", "wrong", "right", "wrong", "wrong", "wrong", "right"]
    assert [row["traceback"] for row in found] == [False] * 4 + [True] + [False] * 2


def test_names_are_unique_and_begin_with_a_point_of_the_issue() -> None:
    from bench.trust.robustness_cases import INPUTS

    names = [one.name for one in INPUTS]
    assert len(set(names)) == len(names) >= 120
    assert all(name[:2].isdigit() and one.right for name, one in zip(names, INPUTS, strict=True))
    assert all((one.trial is None) != (one.score is None) for one in INPUTS)


def test_children_do_not_remove_the_folder_in_which_they_are_tried(monkeypatch: Any, capsys: Any) -> None:
    """Forked ones did at their end, when it was a TemporaryDirectory."""
    from bench.trust import robustness, robustness_cases
    from bench.trust.robustness_cases.inputs import Input, World

    folders = []

    def trial(t: Any) -> None:
        t.write("stub.py", STUB)
        t.done(t.run("fine", program="stub"))
        t.check((t.folder / "stub.py").exists(), "the folder is gone")
        folders.append(t.folder.parent)

    monkeypatch.setattr(robustness_cases, "INPUTS", [Input("01 a", "0", trial), Input("02 b", "0", trial)])
    monkeypatch.setattr(World, "warm_up", lambda self: None)
    monkeypatch.setattr(robustness, "strangers_machine", lambda folder: None)
    robustness.main([])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["wrong"] == 0
    assert folders[0] == folders[1] and not folders[0].exists()


def test_the_counts_are_those_of_the_rows(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """The last line is JSON, and the exit code says whether anything is wrong."""
    from bench.trust import robustness, robustness_cases
    from bench.trust.robustness_cases.inputs import Input, World

    def stub(what: str) -> Callable[[Any], None]:
        def trial(t: Any) -> None:
            t.write("stub.py", STUB)
            t.done(t.run(what, program="stub", fresh=True))

        return trial

    monkeypatch.setattr(
        robustness_cases, "INPUTS", [Input("01 a", "0", stub("fine")), Input("02 b", "0", stub("breaks"))]
    )
    monkeypatch.setattr(World, "warm_up", lambda self: None)
    monkeypatch.setattr(robustness, "strangers_machine", lambda folder: None)
    robustness.main(["--only", "01", "--keep", str(tmp_path)])
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (counts["inputs"], counts["wrong"], counts["tracebacks"]) == (1, 0, 0)
    with pytest.raises(SystemExit, match="1"):
        robustness.main(["--keep", str(tmp_path)])
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (counts["inputs"], counts["wrong"], counts["wrong_ones"], counts["traceback_ones"]) == (
        2,
        1,
        ["02 b"],
        ["02 b"],
    )
    with pytest.raises(SystemExit, match="no input"):
        robustness.main(["--only", "nothing such"])
