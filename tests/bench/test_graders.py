"""bench/trust/graders.py: what was saved is what our scorers say today, and every disagreement was judged by a reader.

The others' verdicts are those of the saved run: they need lm-evaluation-harness in an interpreter of its own.
"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAVED = ROOT / "bench" / "results" / "trust" / "graders.json"
pytestmark = pytest.mark.skipif(not SAVED.exists(), reason="bench/ comes with the repository alone")


@pytest.fixture(scope="module")
def saved():
    return json.loads(SAVED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def graders():
    from bench.trust import graders

    return graders


def test_our_scorers_say_what_was_saved(graders, saved):
    """A scorer that judges one of these replies anew fails here: `python -m bench.trust.graders --save` says why."""
    replies = graders.outputs()
    assert len(replies) == saved["outputs"]
    for name, now in graders.our_verdicts(replies).items():
        then = saved["verdicts"][name]
        moved = [(one["id"], a, b) for one, a, b in zip(replies, then, now, strict=True) if a != graders.LETTERS[b]]
        assert not moved, (name, moved)


def test_disagreements_are_all_listed_and_judged(graders, saved):
    replies = graders.outputs()
    meanings = {letter: verdict for verdict, letter in graders.LETTERS.items()}
    back = {name: [meanings[letter] for letter in row] for name, row in saved["verdicts"].items()}
    listed = graders.disagreements(replies, back)
    assert len(listed) == saved["disagreements"] == len(saved["listed"]) and saved["not_judged"] == 0
    assert not saved["left_out"] and {theirs for _, theirs in graders.PAIRS} <= set(back)
    assert [(row["id"], row["right"], row["note"]) for row in listed] == [
        (row["id"], row["right"], row["note"]) for row in saved["listed"]
    ]
    used = {(row["ours"], row["theirs"], row["id"]) for row in listed}
    assert set(graders.notes()) == used  # a note on replies that agree would be a stale one


def test_judgements_follow_from_what_the_reader_took_for_right(graders, saved):
    right = {one["id"]: one["right"] for one in graders.outputs() if "right" in one}
    for row in saved["listed"]:
        if row["id"] in right:
            a, b = row["verdicts"]
            truth = right[row["id"]]
            expected = {"ours"} if a == truth else {"theirs", "format"} if b == truth else {"neither"}
            assert row["right"] in expected and len(row["note"]) > 20, row


def test_cases_cover_what_graders_stumble_over(graders):
    kinds = Counter(one["kind"] for one in graders.outputs() if "kind" in one)
    assert len(kinds) >= 15 and sum(kinds.values()) >= 100


def test_documented_figures_are_the_saved_ones(saved):
    docs = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    text = docs.partition("## Our graders and others")[2].partition("\n## ")[0]
    assert f"{saved['outputs']} replies" in text and f"{saved['disagreements']} disagreements" in text
    rows = re.findall(
        r"^\| (.+?) \| (.+?) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE
    )
    assert [tuple(row) for row in rows] == [
        (pair["ours"], pair["theirs"], *map(str, (
            pair["compared"], pair["disagreements"], pair["on_model_replies"],
            *(pair["right"].get(who, 0) for who in ("ours", "theirs", "format")),
        )))
        for pair in saved["pairs"]
    ]  # fmt: skip
