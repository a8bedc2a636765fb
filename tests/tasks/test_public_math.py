"""MATH: rows, levels and subjects, what is dropped, and answers that other sets write in their own way."""

import json
import sys
from types import SimpleNamespace

import pytest

from tinylora.config.recipe import load_recipe, parse_recipe
from tinylora.errors import UserError
from tinylora.tasks import build_task
from tinylora.tasks.build import make_scorer
from tinylora.tasks.sets.public_sets import PUBLIC, SUBJECTS


def problem(text, answer, level=1, subject="Algebra"):
    solution = rf"Not \boxed{{0}} but \boxed{{{answer}}}."
    return {"problem": text, "solution": solution, "level": f"Level {level}", "type": subject}


def write(folder, **rows):
    for name, some in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def build(name, path, options="{}"):
    config = parse_recipe(f'[task]\nname = "{name}"\npath = "{path}"\noptions = {options}', "test")
    return build_task(config.task, config.prompt)


def some(num=60):
    names = ("Algebra", "Counting & Probability", "Number Theory")
    return [problem(f"Problem {i}?", rf"\frac{{{i}}}{{7}}", level=1 + i % 5, subject=names[i % 3]) for i in range(num)]


def test_the_answer_is_the_last_box_of_the_solution(tmp_path):
    task = build("math", write(tmp_path, train=some(), test=[problem("a?", r"\frac{1}{2}")]))
    item = task.items("test")[0]
    assert (item.answer, item.metadata["level"]) == (r"\frac{1}{2}", "Level 1") and "solution" in item.metadata
    assert task.score(item, r"So \boxed{0.5}.")["strict"] == 1.0 and task.score(item, r"\boxed{0}")["strict"] == 0.0
    assert "\\boxed{}" in task.prompt(item)[0]["content"]
    assert task.counts()["train"] + task.counts()["validation"] == 60
    write(tmp_path, test=[{"problem": "a?", "solution": "none"}])
    with pytest.raises(UserError, match=r"line 1: no 'answer', and no \\boxed\{...\} in the solution 'none'"):
        build("math", tmp_path)
    write(tmp_path, test=[{"problem": "a?"}])
    with pytest.raises(UserError, match="line 1: there is no 'answer'"):
        build("math", tmp_path)


def test_train_rows_that_are_test_rows_are_dropped_and_counted(tmp_path):
    """MATH-500 is a part of MATH's test file, so this also keeps what is trained on out of math500."""
    test = [problem("Problem  1? ", "1"), problem("Problem 2?", "2", level=5)]
    path = write(tmp_path, train=some(), test=test)
    task = build("math", path)
    assert (task.counts()["overlaps"], task.counts()["test"]) == (2, 2)
    trained = {item.question for split in ("train", "validation") for item in task.items(split)}
    assert not {"Problem 1?", "Problem 2?"} & trained and len(trained) == 58
    # A level that is left out still counts as test: Problem 2 is of level 3 in the train file and of 5 in the test's.
    part = build("math", path, "{levels = [1, 3]}")
    assert part.counts()["overlaps"] == 2 and [item.question for item in part.items("test")] == ["Problem  1? "]
    assert "Problem 2?" not in {item.question for split in ("train", "validation") for item in part.items(split)}


def test_levels_and_subjects(tmp_path):
    path = write(tmp_path, train=[*some(), problem("Odd.", "1", level="?")], test=some(65)[60:])
    task = build("math", path, '{levels = [2, 3], subjects = ["counting_and_probability", "algebra"]}')
    items = [item for split in ("train", "validation", "test") for item in task.items(split)]
    assert {item.metadata["level"] for item in items} == {"Level 2", "Level 3"}
    assert {item.metadata["type"] for item in items} == {"Algebra", "Counting & Probability"}
    assert len(items) == sum(i % 5 in (1, 2) and i % 3 < 2 for i in range(65))
    five = [{"problem": f"{i}?", "answer": "1", "level": i, "subject": "Precalculus"} for i in range(1, 6)]
    rows = build("math500", write(tmp_path, test=five), '{levels = [4], subjects = ["precalculus"]}')
    assert [item.question for item in rows.items("test")] == ["4?"]
    for options, message in (
        ("{levels = [6]}", "levels: 6 is not among 1, 2, 3, 4, 5"),
        ("{levels = 3}", "levels must be a list, got '3'"),
        ("{levels = []}", "levels must be a list"),
        ("{levels = [true]}", "True is not among"),
        ('{subjects = ["Algebra"]}', "subjects: 'Algebra' is not among algebra, counting_and_probability"),
        ("{level = [1]}", "math has no option 'level'; it has: levels, subjects"),
    ):
        with pytest.raises(UserError, match=message):
            build("math", path, options)
    write(tmp_path, test=[{"problem": "a?", "answer": "1"}])
    with pytest.raises(UserError, match=r"levels needs 'level' in every row.* beside 'a\?'; leave the option out"):
        build("math500", path, "{levels = [1]}")


def test_all_seven_configurations_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [problem(f"{split} {config} {i}?", str(i)) for i in range(10)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    counts = build("math", "").counts()
    assert (counts["train"] + counts["validation"], counts["test"]) == (70, 70)
    assert asked == [("EleutherAI/hendrycks_math", name, split) for split in ("train", "test") for name in SUBJECTS]
    assert len(SUBJECTS) == 7


@pytest.mark.parametrize("gold", ["033", "33"])
@pytest.mark.parametrize("scorer", ["boxed", "number", "math-verify"])
def test_leading_zeros(scorer, gold):
    """AIME's answers are three digits: 033 is 33."""
    for reply in ("033", "33"):
        text = reply if scorer == "number" else rf"\boxed{{{reply}}}"
        assert make_scorer(scorer, {}).score(gold, text)["strict"] == 1.0, reply
    assert make_scorer(scorer, {}).score(gold, r"330" if scorer == "number" else r"\boxed{330}")["strict"] == 0.0


@pytest.mark.parametrize(("gold", "same"), [(r"\$18.90", "18.9"), (r"\$32,\!348", "32348"), (r"\$36", r"\$36")])
def test_money_as_answer(gold, same):
    """Three of MATH-500's answers begin with an escaped dollar, which is no delimiter; each stopped the evaluation."""
    scorer = make_scorer("math-verify", {})
    assert scorer.score(gold, rf"\boxed{{{same}}}")["strict"] == 1.0
    assert scorer.score(gold, r"\boxed{35}")["strict"] == 0.0


def test_the_recipe_asks_as_math500_is_asked():
    recipe, qwen = load_recipe("math"), load_recipe("math500-qwen-boxed")
    assert recipe.prompt == qwen.prompt and recipe.task.scorer == qwen.task.scorer == PUBLIC["math"].scorer
    assert recipe.generation.max_new_tokens == qwen.generation.max_new_tokens
