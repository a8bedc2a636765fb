"""Files of replies that are read back: what no scorer can have said is refused, with its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from tinylora.errors import UserError
from tinylora.evaluation.items import read_untrained, write_items
from tinylora.rollouts.replies import Reply


def reply(number: int, right: float = 1.0) -> Reply:
    scores = {"strict": right, "value_only": right}
    return Reply(f"id{number}", "q", "a", "text", right, right, True, 3, scores, True)


def changed(path: Path, change: dict[str, Any]) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), **change})
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strict": float("nan")}, "the score strict must be a number from 0 to 1, got 'nan'"),
        ({"strict": 7}, "the score strict must be a number from 0 to 1, got '7'"),
        ({"value_only": -1}, "value_only must be a number from 0 to 1"),
        ({"value_only": "1"}, "value_only must be a number from 0 to 1"),
        ({"value_only": None}, "value_only must be a number from 0 to 1"),
        ({"strict": float("inf")}, "strict must be a number from 0 to 1"),
        ({"strict": 0.0}, "the score strict is 0.0 beside 1.0 among all scores"),
        ({"stopped": False}, "strict is 1.0 for a reply that was cut off"),
        ({"scores": {"strict": 1.0, "value_only": 1.0, "more": float("nan")}}, "scores must be named finite numbers"),
        ({"scores": []}, "scores must be named finite numbers"),
        ({"num_tokens": -3}, "num_tokens must be a whole number"),
        ({"stopped": "yes"}, "is 1.0 for a reply that was cut off|stopped must be of type bool"),
        ({"text": 5}, "text must be of type str"),
    ],
)
def test_replies_that_no_scorer_gave_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """NaN and 7 as scores of `--untrained` were taken and counted."""
    path = tmp_path / "untrained.jsonl"
    write_items(path, {"untrained": [reply(1), reply(2)]}, {"protocol": "p"})
    assert read_untrained(path, {"protocol": "p"}, ["id1", "id2"]) == (reply(1), reply(2))
    changed(path, change)
    not_json = r"damaged \((NaN|Infinity) is not JSON"
    with pytest.raises(UserError, match=rf"untrained\.jsonl, line 2.* ({message}|{not_json})"):
        read_untrained(path, {"protocol": "p"}, ["id1", "id2"])


@pytest.mark.parametrize("kept", [["id1"], ["id2", "id1"], ["id1", "id1"], ["id1", "id2", "id3"]])
def test_replies_to_other_items_are_refused(tmp_path: Path, kept: list[str]) -> None:
    path = tmp_path / "untrained.jsonl"
    write_items(path, {"untrained": [reply(int(name[2:])) for name in kept]}, {"protocol": "p"})
    with pytest.raises(UserError, match="does not hold one reply to each of the 2 items in their order"):
        read_untrained(path, {"protocol": "p"}, ["id1", "id2"])


def test_replies_that_were_cut_off_are_taken(tmp_path: Path) -> None:
    cut = Reply("id1", "q", "a", "text", 0.0, 1.0, False, 3, {"strict": 1.0, "value_only": 1.0}, True)
    write_items(tmp_path / "u.jsonl", {"untrained": [cut]}, {})
    assert read_untrained(tmp_path / "u.jsonl", {}, ["id1"]) == (cut,)
