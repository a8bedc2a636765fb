"""Rules of reasoning-gym that evaluate the answer as Python do not run what a model writes."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from reasoning_gym.factory import DATASETS

from tinylora.tasks.scorers.evaluated import how_evaluated, may_be_evaluated
from tinylora.tasks.sets.reasoning_gym import ReasoningGymScorer, Source

EVALUATE = {
    "string_insertion": "values", "spiral_matrix": "values", "binary_matrix": "values", "n_queens": "values",
    "simple_integration": "mathematics", "intermediate_integration": "mathematics",
    "polynomial_multiplication": "mathematics", "puzzle24": "mathematics", "countdown": "mathematics",
}  # fmt: skip
"""Found by reading the library."""
ATTACKS = (
    "open({path!r}, 'w')",
    "[open({path!r}, 'w')]",
    "__import__('pathlib').Path({path!r}).touch()",
    "[x for x in [1] if open({path!r}, 'w')]",
    "(lambda: open({path!r}, 'w'))()",
    "sqrt(\"open({path!r}, 'w')\")",
    "sin(open({path!r}, 'w')) + 5!",
    "\n open({path!r}, 'w')",
    "f\"{{open({path!r}, 'w')}}\"",
    "Symbol('x', **open({path!r}, 'w'))",
    "ｏpen({path!r}, 'w')",
)


@pytest.fixture(scope="module")
def sources() -> dict[str, Any]:
    made = {}
    for name in EVALUATE:
        source = Source(name, {})
        made[name] = (source, source.generate(3, 0)[0])
    return made


@pytest.mark.parametrize("name", EVALUATE)
@pytest.mark.parametrize("style", ["whole", "tags", "boxed"])
def test_a_reply_runs_no_code(sources: dict[str, Any], name: str, style: str, tmp_path: Path) -> None:
    source, items = sources[name]
    scorer = ReasoningGymScorer(source, style)
    for number, attack in enumerate(ATTACKS):
        witness = tmp_path / str(number)
        code = attack.format(path=str(witness))
        for reply in (code, f"<answer>{code}</answer>", rf"\boxed{{{code}}}", f"so\n{code}"):
            scores = scorer.score_item(items[0], reply)
            assert not witness.exists(), reply
            assert scores["strict"] == scores["value_only"] == 0


@pytest.mark.parametrize("name", EVALUATE)
def test_right_answers_stay_right_and_wrong_ones_keep_their_score(sources: dict[str, Any], name: str) -> None:
    source, items = sources[name]
    dataset = source._dataset
    for item in items:
        entry = source.entries[item.id]
        for answer in (entry["answer"], "1 + 2", "no idea", "", "[[1, 0], [0, 1]]", "x**2/3 + sin(2*x) + C"):
            assert source.score_answer(item, answer) == dataset.score_answer(answer, entry), answer
        assert source.score_answer(item, entry["answer"]) == 1


def test_lists_are_still_read_as_lists(sources: dict[str, Any]) -> None:
    source, items = sources["spiral_matrix"]
    answer = source.entries[items[0].id]["answer"]
    assert source.score_answer(items[0], str([int(one) for one in answer.split()])) == 0.1


def test_no_other_rule_of_the_library_evaluates() -> None:
    """The list above is whole: by every mention of a function that evaluates, in every rule."""
    for name, (dataset, _) in DATASETS.items():
        words = re.findall(r"\b(?:eval|exec|parse_expr|sympify|compile)\(", inspect.getsource(dataset.score_answer))
        found = how_evaluated(dataset.score_answer)
        if name in EVALUATE:
            assert words and found == EVALUATE[name], name
        elif name != "composite":
            assert found == "" or name == "number_sorting", (name, words)  # which evaluates its own answer alone


@pytest.mark.parametrize("text", ["9**9**9", "(((2**9)**9)**9)", "2**100000", "x**(9**9)", "1" * 20_000])
def test_mathematics_without_end_is_not_begun(text: str) -> None:
    assert not may_be_evaluated(text, "mathematics")
