"""GSM8K, the user's own JSONL, prompts and Python rewards: what they give, and what they say to bad input."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tinylora.errors import UserError
from tinylora.tasks import ScorerError, build_task
from tinylora.tasks.base import SPLITS
from tinylora.tasks.config import PromptConfig, TaskConfig


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows(num=60, **more):
    return [{"question": f"What is {i} + 1?", "answer": str(i + 1), **more} for i in range(num)]


def loose(config, **changes):
    """The settings as a plain object, past the checks of the config class: tasks must stand on their own checks."""
    return SimpleNamespace(**{**dataclasses.asdict(config), **changes})


def jsonl(path, prompt=None, **settings):
    return build_task(loose(TaskConfig(), name="jsonl", path=path, **settings), prompt or PromptConfig())


def everything(task):
    return [item for split in SPLITS if task.counts()[split] for item in task.items(split)]


def test_jsonl(tmp_path):
    path = write(tmp_path / "a.jsonl", ["\ufeff", *rows(), "\n", rows()[3], {**rows()[4], "level": "easy"}])
    task = jsonl(path)
    assert {item.question: item.answer for item in everything(task)} == {r["question"]: r["answer"] for r in rows()}
    counts = task.counts()
    assert counts["distinct"] == 60 == sum(counts[split] for split in SPLITS)
    assert counts["duplicates"] == 2
    # the order of the file moves no question to another split
    other = jsonl(write(tmp_path / "b.jsonl", rows()[::-1]))
    for split in SPLITS:
        assert {i.id for i in task.items(split)} == {i.id for i in other.items(split)}


def test_jsonl_prompt_key_metadata_and_json_answers(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"{i}", "answer": {"n": i}, "level": 2} for i in range(60)])
    task = jsonl(path, scorer="json-fields")
    item = task.items("train")[0]
    assert json.loads(item.answer) == {"n": int(item.question)} and item.metadata == {"level": 2}
    assert task.score(item, f'{{"n": {item.question}}}')["strict"] == 1.0


def test_jsonl_given_splits(tmp_path):
    given = [{**row, "split": "test" if i < 10 else "train"} for i, row in enumerate(rows())]
    task = jsonl(write(tmp_path / "a.jsonl", given))
    assert {item.question for item in task.items("test")} == {row["question"] for row in given[:10]}
    assert task.counts()["validation"] > 0  # taken from train by hash
    assert task.counts()["distinct"] == 60
    three = [{**row, "split": SPLITS[i % 3]} for i, row in enumerate(rows())]
    assert [jsonl(write(tmp_path / "b.jsonl", three)).counts()[split] for split in SPLITS] == [20, 20, 20]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (['{"question": "a", "answer": "1"}\n', '{"question": "b", \n'], r"bad\.jsonl, line 2: not valid JSON"),
        (['{"question": "a", "answer": NaN}\n'], r"line 1: not valid JSON \(NaN is not JSON\)"),
        (["[" * 100_000], "line 1: not valid JSON"),
        (["[1, 2]\n"], "line 1: must be a JSON object"),
        ([], "is empty"),
        (["\n \n"], "is empty"),
        ([{"question": "a"}], "line 1: there is no 'answer'; the line has question"),
        ([{"question": "a", "answer": None}], "there is no 'answer'"),
        ([{"question": "a", "answer": "  "}], "'answer' is blank"),
        ([{"question": "a", "answer": 42}], "'answer' must be a text, got '42'; put it in quotes"),
        ([{"question": ["a"], "answer": "1"}], "'question' must be a text"),
        ([{"answer": "1"}], "there is no 'question'"),
        ([{"question": "a", "prompt": "b", "answer": "1"}], "both 'prompt' and 'question'"),
        (['{"question": "\\ud800", "answer": "1"}\n'], "lone surrogate"),
        ([*rows(), {**rows()[3], "answer": "9"}], "line 61: the question of .*line 4 again with another answer"),
        (
            [{"question": "a", "answer": "1"}, {"question": "b", "answer": "1", "split": "test"}],
            "every line has 'split'",
        ),
        ([{"question": "a", "answer": "1", "split": "val"}], "'split' must be one of train, validation, test"),
        (
            [{"question": "a", "answer": "1", "split": "train"}, {"question": " a", "answer": "1", "split": "test"}],
            "line 2: the question of .*line 1 again, in test instead of train",
        ),
        (rows(2), "no questions left in the"),
        ([*rows(), {"question": "Who?", "answer": "me"}], "question 'Who\\?': .* 'me' is not a number"),
    ],
)
def test_bad_jsonl(tmp_path, bad, message):
    with pytest.raises(UserError, match=message):
        jsonl(write(tmp_path / "bad.jsonl", bad))


def test_bad_jsonl_files(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        jsonl(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="cannot read"):
        jsonl(str(tmp_path))
    with pytest.raises(UserError, match=r"needs task\.path"):
        jsonl("")
    (tmp_path / "latin.jsonl").write_bytes('{"question": "é", "answer": "1"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"line 1: not UTF-8"):
        jsonl(str(tmp_path / "latin.jsonl"))


def test_a_split_without_a_share_is_an_error_only_when_asked_for(tmp_path):
    task = jsonl(write(tmp_path / "a.jsonl", rows(5)), validation_share=0.0, test_share=1.0)
    assert len(task.items("test")) == 5
    with pytest.raises(UserError, match="no questions left in the train split"):
        task.items("train")
    with pytest.raises(UserError, match="split must be one of"):
        task.items("dev")


@pytest.mark.parametrize(
    ("name", "message"),
    [("gsm", "did you mean gsm8k"), ("chain_sum", "did you mean reasoning_gym:chain_sum"), ("", "must be gsm8k")],
)
def test_unknown_task(name, message):
    with pytest.raises(UserError, match=message):
        build_task(loose(TaskConfig(), name=name), PromptConfig())


def test_options_are_not_ignored(tmp_path):
    with pytest.raises(UserError, match="jsonl has none; got level"):
        jsonl(write(tmp_path / "a.jsonl", rows()), options={"level": 1})


def test_gsm8k(tmp_path):
    train = [{"question": f"How many is {i}?", "answer": f"Count: <<{i}={i}>>.\n#### {i:,}"} for i in range(1000, 1100)]
    test = [{"question": f"And {i}?", "answer": str(i)} for i in range(7)]
    write(tmp_path / "train.jsonl", [*train, train[0], test[2]])
    write(tmp_path / "test.jsonl", test)
    task = build_task(TaskConfig(name="gsm8k", path=str(tmp_path)), PromptConfig())
    assert [item.question for item in task.items("test")] == [row["question"] for row in test]
    counts = task.counts()
    assert counts["train"] + counts["validation"] == 100 and counts["validation"] > 0
    assert (counts["duplicates"], counts["overlaps"]) == (1, 1)
    assert task.describe().endswith("7 test (1 train rows dropped: their question is in the test file)")
    item = task.items("train")[0]
    assert task.score(item, item.question.split()[-1].rstrip("?")) == {"strict": 1.0, "value_only": 1.0}
    assert item.metadata["solution"].startswith("Count")


def test_bad_gsm8k(tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl", [{"question": "a", "answer": "so\n#### "}])
    with pytest.raises(UserError, match=r"there is no .*test\.jsonl"):
        build_task(TaskConfig(name="gsm8k", path=str(tmp_path)), PromptConfig())
    write(tmp_path / "test.jsonl", rows(3))
    with pytest.raises(UserError, match="line 1: no answer behind '####'"):
        build_task(TaskConfig(name="gsm8k", path=str(tmp_path)), PromptConfig())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'tinylora\[hub\]'"):
        build_task(TaskConfig(name="gsm8k"), PromptConfig())

    class Offline:
        @staticmethod
        def load_dataset(*args, **kwargs):
            raise ConnectionError("no network\nlong story")

    monkeypatch.setitem(sys.modules, "datasets", Offline)
    with pytest.raises(UserError, match=r"could not be loaded from the hub \(no network\).*set task.path"):
        build_task(TaskConfig(name="gsm8k"), PromptConfig())


def test_gsm8k_from_the_hub(monkeypatch):
    class Hub:
        @staticmethod
        def load_dataset(name, config, split):
            assert (name, config) == ("openai/gsm8k", "main")
            return rows(50) if split == "train" else [{"question": "Last?", "answer": "#### 5"}]

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    task = build_task(TaskConfig(name="gsm8k"), PromptConfig())
    assert task.counts()["test"] == 1 and task.items("test")[0].answer == "5"


def test_prompt(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "{question} {x}", "answer": "1"}, *rows()])
    prompt = PromptConfig(
        system="Be brief.", template='Q: {question} {"n": 1}', few_shot=({"question": "1 + 1?", "answer": "2"},)
    )
    task = jsonl(path, prompt)
    odd = next(item for item in everything(task) if item.question == "{question} {x}")
    assert task.prompt(odd) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": 'Q: 1 + 1? {"n": 1}'},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": 'Q: {question} {x} {"n": 1}'},
    ]
    task.prompt(odd)[0]["content"] = "changed"
    assert task.prompt(odd)[0]["content"] == "Be brief."
    assert jsonl(path).prompt(odd) == [{"role": "user", "content": "{question} {x}"}]
    held_out = task.items("test")[0]
    example = {"question": held_out.question, "answer": held_out.answer}
    with pytest.raises(UserError, match="is a test question of task jsonl"):
        jsonl(path, PromptConfig(few_shot=(example,)))
    with pytest.raises(UserError, match=r"template must contain \{question\}, got 'Q'"):
        jsonl(path, loose(PromptConfig(), template="Q"))
    with pytest.raises(UserError, match="example 1 must have a question and an answer"):
        jsonl(path, loose(PromptConfig(), few_shot=({"question": "a", "anser": "b"},)))


REWARDS = """
import math
def brief(item, text, limit=3):
    return len(text) <= limit
def named(item, text):
    return {"strict": float(text == item["answer"]), "reward": 2.5}
def crash(item, text):
    return 1 / 0
def give(value):
    return lambda item, text: value
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "broken_rewards.py").write_text("import no_such_package\n")
    (tmp_path / "raising_rewards.py").write_text("raise RuntimeError('at import')\n")
    yield write(tmp_path / "a.jsonl", rows())
    for name in ("my_rewards", "broken_rewards", "raising_rewards"):
        sys.modules.pop(name, None)


def test_python_reward(rewards):
    task = jsonl(rewards, scorer="my_rewards:brief")
    item = task.items("train")[0]
    assert task.score(item, "abc") == {"reward": 1.0, "strict": 1.0, "value_only": 1.0}
    assert task.score(item, "abcd")["reward"] == 0.0
    assert jsonl(rewards, scorer="my_rewards:brief", scorer_options={"limit": 4}).score(item, "abcd")["reward"] == 1.0
    task = jsonl(rewards, scorer="my_rewards:named")
    assert task.score(item, item.answer) == {"strict": 1.0, "value_only": 1.0, "reward": 2.5}
    no_answers = write(Path(rewards).parent / "no_answers.jsonl", [{"question": str(i)} for i in range(60)])
    assert jsonl(no_answers, scorer="my_rewards:brief").items("train")[0].answer == ""


@pytest.mark.parametrize("value", [0.5, 1, True, np.float32(0.5), np.bool_(True), torch.tensor(0.5)])
def test_python_reward_takes_numbers(rewards, value):
    task = jsonl(rewards, scorer="my_rewards:brief")
    task.scorer.function = lambda item, text: value
    assert task.score(task.items("train")[0], "x")["strict"] == float(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "must be finite, got nan"),
        (float("inf"), "must be finite, got inf"),
        (None, "must be a number, got 'None' of type NoneType"),
        ("1", "must be a number"),
        (2.5, r"must lie in \[0, 1\], got 2.5"),
        ({"reward": 1.0}, r"must hold 'strict', got the keys \['reward'\]"),
        ({"strict": 2.0}, r"'strict' must lie in \[0, 1\]"),
        ({"strict": 1.0, "style": float("nan")}, "score 'style' must be finite"),
        (torch.ones(2), "the scorer raised"),
    ],
)
def test_python_reward_that_is_no_score_shows_the_item(rewards, value, message):
    task = jsonl(rewards, scorer="my_rewards:brief")
    task.scorer.function = lambda item, text: value
    item = task.items("train")[0]
    with pytest.raises(ScorerError, match=message) as caught:
        task.score(item, "a reply " * 100)
    assert caught.value.item is item and caught.value.reply == "a reply " * 100
    assert item.question in str(caught.value) and "characters...]" in str(caught.value)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_no_scorer_may_give_nan(tmp_path, monkeypatch):
    task = jsonl(write(tmp_path / "a.jsonl", rows()))
    monkeypatch.setattr(task.scorer, "score_item", lambda *_: {"strict": 1.0, "value_only": 1.0, "more": float("nan")})
    with pytest.raises(ScorerError, match="the score 'more' must be finite, got nan"):
        task.score(task.items("train")[0], "x")


def test_python_reward_that_raises(rewards):
    task = jsonl(rewards, scorer="my_rewards:crash")
    with pytest.raises(ScorerError, match=r"raised ZeroDivisionError: .*\(my_rewards.py, line 8\).*question 'What is"):
        task.score(task.items("train")[0], "x")


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("my_reward:brief", "there is no module 'my_reward'; run from the folder that holds my_reward.py"),
        ("my_rewards:brif", "my_rewards has no 'brif'; it has brief"),
        ("my_rewards:math", "is a module, not a function"),
        ("my_rewards:", "written module:function"),
        ("broken_rewards:f", "importing 'broken_rewards' failed .*no_such_package"),
        ("raising_rewards:f", "RuntimeError: at import"),
    ],
)
def test_python_reward_that_cannot_be_loaded(rewards, scorer, message):
    with pytest.raises(UserError, match=message):
        jsonl(rewards, scorer=scorer)


def test_the_first_import_of_reasoning_gym_prints_nothing(tmp_path):
    # pip leaves compiling to the first import, and then Python warns of cellpylib's source: four lines before anything
    # of ours in a newcomer's first `make demo`
    done = subprocess.run(
        [sys.executable, "-c", "from tinylora.tasks.sets.reasoning_gym import gym; gym().factory.DATASETS"],
        env={**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
