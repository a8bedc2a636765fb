"""One story through every verb gives what commit 266fbff gave: numbers, texts, keys and names of files.

tests/golden/story.json was written by `golden_story.py` under that commit; see there. Since then its numbers have not
moved: settings that came later, the protocol's hash and the first checkpoint's name were added to it. Floats may differ
by rounding, which another processor does otherwise; two versions on one machine are compared bit by bit by
`bench/trust/house.py`. The help of the verbs is no chapter: docs/cli.md holds it, and tests/docs/test_generated.py
checks it.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from golden_story import TESTS, portable

GOLDEN = json.loads((TESTS / "golden" / "story.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-3
"""Relative, and of a thousandth where a number is smaller. Seen between AVX2 and AVX-512: 2e-7."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("golden") / "story"
    done = subprocess.run(
        [sys.executable, str(TESTS / "helpers" / "golden_story.py"), str(folder)],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads((folder / "story.json").read_text(encoding="utf-8"))
    return told


def differences(found: Any, golden: Any, at: str = "") -> list[str]:
    """Where the two differ, in words."""
    if isinstance(golden, dict) and isinstance(found, dict):
        names = sorted(golden.keys() ^ found.keys())
        gone = [f"{at}/{name} is {'new' if name in found else 'gone'}" for name in names]
        return gone + [d for k in golden.keys() & found.keys() for d in differences(found[k], golden[k], f"{at}/{k}")]
    if isinstance(golden, list) and isinstance(found, list):
        if len(golden) != len(found):
            return [f"{at} has {len(found)} entries, once {len(golden)}"]
        return [d for i, pair in enumerate(zip(found, golden, strict=True)) for d in differences(*pair, f"{at}/{i}")]
    if isinstance(golden, float) and isinstance(found, float):
        close = abs(found - golden) <= TOLERANCE * max(abs(golden), TOLERANCE)
        return [] if close else [f"{at}: {found}, once {golden}"]
    return [] if found == golden and type(found) is type(golden) else [f"{at}: {found!r}, once {golden!r}"]


def test_public_names_may_come_and_none_may_go(story: dict[str, Any]) -> None:
    assert set(story["public names"]) >= set(GOLDEN["public names"])


@pytest.mark.parametrize("chapter", [name for name in GOLDEN if name != "public names"])
def test_the_story_is_what_it_was(story: dict[str, Any], chapter: str) -> None:
    assert differences(portable(story[chapter]), GOLDEN[chapter], chapter) == []


def test_a_run_begun_before_ends_as_if_it_had_never_stopped(story: dict[str, Any]) -> None:
    """And bit for bit on the machine that began it."""
    assert len(story["resumed metrics"]) == len(story["begun metrics"]) == 7
    resumed, whole = (
        [{k: v for k, v in row.items() if not k.startswith("validation")} for row in story[f"{name} metrics"]]
        for name in ("resumed", "begun")
    )  # it was validated after its third step, then its last
    assert differences(portable(resumed), portable(whole)) == []


def test_differences_are_seen() -> None:
    golden = {"a": [1.0, "x"], "b": 2}
    assert differences({"a": [1.0005, "x"], "b": 2}, golden) == []
    assert differences({"a": [1.01, "y"], "b": 2.0, "c": 0}, golden) != []
    for other in ({"a": [1.01, "x"], "b": 2}, {"a": [1.0], "b": 2}, {"a": [1.0, "x"], "b": True}, {"b": 2}):
        assert len(differences(other, golden)) == 1, other
