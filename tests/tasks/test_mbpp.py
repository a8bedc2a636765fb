"""MBPP: rows, splits, defaults, and the scorer python-tests on replies written by hand."""

import json
import sys
from types import SimpleNamespace

import pytest

from tinylora.config.recipe import load_recipe, parse_recipe
from tinylora.errors import UserError
from tinylora.tasks import build_task
from tinylora.tasks.base import Item, ScorerError
from tinylora.tasks.build import make_scorer
from tinylora.tasks.sandbox import run as sandbox
from tinylora.tasks.sets.mbpp import TEMPLATE, PythonTestsScorer, _names_of

UNSAFE = "scorer = 'python-tests'\nscorer_options = {unsafe_without_namespaces = true}\n"


@pytest.fixture(scope="module")
def namespaces() -> bool:
    """Whether replies are shut in here. Where not, these tests run their own harmless code without."""
    try:
        sandbox.check_isolation()
    except UserError:
        return False
    return True


def row(number, text="Write a function to add one to a number.", **fields):
    return {
        "task_id": number, "text": text, "code": f"def f(x):\r\n  return x + {number}", "test_setup_code": "",
        "test_list": [f"assert f(1) == {1 + number}", f"assert f(2)=={2 + number}"], "challenge_test_list": [],
        **fields,
    }  # fmt: skip


def write(folder, test, train):
    for name, rows in (("test", test), ("train", train)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return folder


def open_task(path, more=""):
    config = parse_recipe(f'[task]\nname = "mbpp"\npath = "{path}"\n{more}', "test")
    return build_task(config.task, config.prompt)


def test_rows_and_splits(tmp_path, namespaces):
    train = [row(i, f"Add {i} to it.") for i in range(40)]
    test = [row(50, "add 3 to it"), row(51, "Add 51.")]
    task = open_task(write(tmp_path, test, train), "" if namespaces else UNSAFE)
    counts = task.counts()
    assert (counts["train"] + counts["validation"], counts["test"], counts["overlaps"]) == (39, 2, 1)
    item = task.items("test")[1]
    assert item.question == "Add 51.\nYour code should pass these tests:\nassert f(1) == 52\nassert f(2)==53"
    assert item.answer == "def f(x):\n  return x + 51"
    assert item.metadata == {
        "task_id": 51, "text": "Add 51.", "tests": ["assert f(1) == 52", "assert f(2)==53"], "setup": "",
    }  # fmt: skip
    asked = task.prompt(item)[0]["content"]
    assert asked.startswith("You are an expert Python programmer") and "assert f(2)==53" in asked
    for one in (*task.items("train"), *task.items("test")):
        assert task.score(one, f"```python\n{one.answer}\n```") == {"strict": 1.0, "value_only": 1.0, "timed_out": 0.0}


def test_defaults_are_those_of_the_recipe():
    named = parse_recipe('[task]\nname = "mbpp"', "test")
    recipe = load_recipe("mbpp")
    assert (named.task.scorer, named.prompt.template, named.generation.max_new_tokens) == (
        "python-tests", TEMPLATE, 512,
    )  # fmt: skip
    assert (recipe.task.scorer, recipe.prompt.template, recipe.generation.max_new_tokens) == (
        "python-tests", TEMPLATE, 512,
    )  # fmt: skip
    assert len(recipe.eval.prompts) == 3


def test_from_the_hub(monkeypatch, namespaces):
    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [row(1, "Add one.")] if split == "test" else [row(i, f"Add {i} to it.") for i in range(40)]

    asked = []
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert open_task("", "" if namespaces else UNSAFE).counts()["test"] == 1
    name = "google-research-datasets/mbpp"
    assert asked == [(name, "full", "prompt+train+validation"), (name, "full", "test")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": " "}, r"test\.jsonl, line 1: 'text' is blank"),
        ({"test_list": []}, r"line 1: 'test_list' must be a list of texts, one at least, got '\[\]'"),
        ({"test_list": "assert f(1) == 2"}, "'test_list' must be a list of texts"),
        ({"test_list": [1]}, "'test_list' must be a list of texts"),
        ({"test_list": ["assert f("]}, r"line 1: the test 'assert f\(' is no Python"),
        ({"test_setup_code": "root = ("}, r"line 1: the test 'root = \(' is no Python"),
    ],
)
def test_bad_rows(tmp_path, fields, message, namespaces):
    write(tmp_path, [row(1, **fields)], [row(i, f"Add {i}.") for i in range(20)])
    with pytest.raises(UserError, match=message):
        open_task(tmp_path, "" if namespaces else UNSAFE)


def test_without_options(tmp_path, namespaces):
    with pytest.raises(UserError, match="mbpp has none; got level"):
        open_task(tmp_path, "options = {level = 1}")


# --- the scorer ---

GOOD = "def f(x):\n    return x + 1"
ITEM = Item("0" * 64, "Add one.", GOOD, {"tests": ["assert f(1) == 2", "assert f(2) == 3"], "setup": ""})
RIGHT, FORMAT, WRONG = (1.0, 1.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)


@pytest.fixture
def scorer(namespaces):
    return make_scorer("python-tests", {"unsafe_without_namespaces": not namespaces})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"```python\n{GOOD}\n```", RIGHT),
        (f"Here it is:\n\n```Python\n{GOOD}\n```\nIt adds one.", RIGHT),
        (f"```py\n{GOOD}\n```", RIGHT),
        (f"```python\r\n{GOOD}\r\n```\r\n", RIGHT),
        (f"```python\ndef f(x): return 7\n```\nNo:\n```python\n{GOOD}\n```", RIGHT),
        (f"```python\n{GOOD}\n```\nOr worse:\n```python\ndef f(x): return 7\n```", WRONG),  # the last one counts
        (f"```\n{GOOD}\n```", FORMAT),
        (f"```python\nimport math\n```\nand\n```python\n{GOOD}\n```", RIGHT),
        ("```python\ny = 1\n```\nand\n```python\ndef f(x): return x + y\n```", FORMAT),  # only together
        (f"```python\n{GOOD}", FORMAT),  # cut off behind the code
        ("```python\ndef f(x):\n    return x +", WRONG),
        (GOOD, FORMAT),
        (f"The function is:\n{GOOD}", WRONG),
        ("", WRONG),
        ("```python\n```", WRONG),
        ("```python\ndef g(x): return x + 1\n```", WRONG),
        ("```python\ndef f(x): return 2\n```", WRONG),
        ("```python\nimport sys; sys.exit(0)\n```", WRONG),
        ("```python\nclass E:\n    def __eq__(self, other): return True\ndef f(x): return E()\n```", WRONG),
        ("```python\nfrom operator import *\nf = lambda x: add(x, 1)\n```", RIGHT),
        ("I cannot do that: f is unknown.", WRONG),
        ("\0", WRONG),
        ("```python\nf = '\ud800'\n```", WRONG),
        ("f" * 1_000_000, WRONG),
        ("```" * 100_000, WRONG),
        ("```" + "f" * 1_000_000, WRONG),  # quadratic in the first version of the pattern
        ("```" + " " * 1_000_000, WRONG),
        ("```python f\n" * 100_000, WRONG),
        ("```f\n" + "\n" * 1_000_000, WRONG),
        ("```python\n" * 20_000, WRONG),
        ("```python\nf = 1\n```\n" * 3_000, WRONG),
    ],
)  # fmt: skip
def test_replies(scorer, text, expected):
    scores = scorer.score_item(ITEM, text)
    assert (scores["strict"], scores["value_only"], scores["timed_out"]) == expected
    if scores["strict"]:
        assert scorer.parse(text) is not None


def test_a_time_out_is_counted(namespaces):
    options = {"timeout_seconds": 0.5, "unsafe_without_namespaces": not namespaces}
    scorer = make_scorer("python-tests", options)
    text = "```python\nx = 1\n```\n```python\ndef f(x):\n    while True: pass\n```"
    assert scorer.score_item(ITEM, text) == {"strict": 0.0, "value_only": 0.0, "timed_out": 1.0}


def test_names_that_the_code_must_have():
    assert _names_of(("assert f(1) == len([g])",), "") == ("f", "g")
    assert _names_of(("assert f([x for x in y])",), "y = 3") == ("f",)
    assert _names_of(("import math\nassert math.sqrt(f(1))",), "") == ()


def test_code_without_the_names_is_not_run(monkeypatch, scorer):
    monkeypatch.setattr("tinylora.tasks.sets.mbpp.run_python", None)
    assert scorer.score_item(ITEM, "```python\nprint(1)\n```") == {"strict": 0.0, "value_only": 0.0, "timed_out": 0.0}
    with pytest.raises(TypeError):
        scorer.score_item(ITEM, f"```python\n{GOOD}\n```")


def test_setup_runs_between_code_and_tests(scorer):
    item = Item("0" * 64, "Sum.", "", {"tests": ["assert f(root) == 3"], "setup": "root = Node(3)"})
    code = "class Node:\n    def __init__(self, n): self.n = n\ndef f(node): return node.n"
    assert scorer.score_item(item, f"```python\n{code}\n```")["strict"] == 1.0
    assert scorer.score_item(item, "```python\ndef f(node): return 3\n```")["strict"] == 0.0


def test_own_questions_with_tests(tmp_path, namespaces):
    rows = [{"question": f"Add {i}.", "tests": [f"assert f(0) == {i}"], "split": s} for i, s in enumerate(
        ("train", "train", "validation", "test"))]  # fmt: skip
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    recipe = f'[task]\nname = "jsonl"\npath = "{tmp_path}/own.jsonl"\nscorer = "python-tests"\n'
    recipe += "" if namespaces else "scorer_options = {unsafe_without_namespaces = true}\n"
    config = parse_recipe(recipe, "test")
    task = build_task(config.task, config.prompt)
    item = task.items("test")[0]
    assert task.score(item, "```python\ndef f(x): return 3\n```")["strict"] == 1.0
    with pytest.raises(ScorerError, match="needs a list 'tests' of assertions beside the question"):
        task.score(Item("0" * 64, "Add.", ""), "x")
    with pytest.raises(ScorerError, match=r"the test 'assert \(' is no Python"):
        task.score(Item("0" * 64, "Add.", "", {"tests": ["assert ("]}), "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_seconds": 0}, r"timeout_seconds must be a number of at least 0\.1, got 0"),
        ({"timeout_seconds": "5"}, "timeout_seconds must be a number"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds must be a number"),
        ({"memory_mb": 63}, "memory_mb must be a number of at least 64, got 63"),
        ({"unsafe_without_namespaces": 1}, "must be true or false, got 1"),
        ({"time": 1}, "scorer python-tests has no option 'time'; it has: timeout_seconds, memory_mb, unsafe_without_"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        make_scorer("python-tests", options)


def test_a_machine_that_refuses_stops_the_task_before_any_model(tmp_path, monkeypatch):
    sandbox.check_isolation.cache_clear()
    monkeypatch.setattr(sandbox, "_start", lambda *a: (sandbox.sandbox_child.REFUSED, b"?unshare: not here"))
    try:
        path = write(tmp_path, [row(1)], [row(i, f"Add {i}.") for i in range(20)])
        with pytest.raises(
            UserError, match=r"not allow that \(unshare: not here\); .*unsafe_without_namespaces = true"
        ):
            open_task(path)
        assert open_task(path, UNSAFE).counts()["test"] == 1
        assert not PythonTestsScorer(unsafe_without_namespaces=True).isolate
    finally:
        sandbox.check_isolation.cache_clear()
