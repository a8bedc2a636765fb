"""Splits by hash, and reasoning-gym's trap: item i of seed s is item i + 1 of seed s - 1."""

import dataclasses
import hashlib
import json
import unicodedata
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylora.errors import UserError
from tinylora.tasks import build_task, question_id, split_of
from tinylora.tasks.base import SPLITS
from tinylora.tasks.config import PromptConfig, TaskConfig

quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)  # same cases on every machine

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def gym(name, **settings):
    """A task of a plain settings object, past the checks of the config class: tasks must stand on their own checks."""
    config = {**dataclasses.asdict(TaskConfig()), "name": f"reasoning_gym:{name}", **settings}
    return build_task(SimpleNamespace(**config), PromptConfig())


def sums(**settings):
    return gym("chain_sum", **{"options": SUMS, **settings})


def ids(task, split):
    return {item.id for item in task.items(split)}


def test_question_id_is_a_published_hash():
    assert question_id("  What is 1 + 1?\n") == hashlib.sha256(b"What is 1 + 1?").hexdigest()
    assert question_id("caf\N{LATIN SMALL LETTER E WITH ACUTE}") == question_id("cafe\N{COMBINING ACUTE ACCENT}")
    assert question_id("\ud800") != question_id("\ud801")  # lone surrogates have ids too


@quick
@given(st.text())
def test_question_id_ignores_only_normalisation(text):
    normal = unicodedata.normalize("NFC", text).strip()
    assert question_id(text) == question_id(normal) == question_id(f"\n{normal} ")


@quick
@given(st.text(), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 0.5))
def test_validation_share_moves_no_test_question(question, first, second, test_share):
    assert (split_of(question, first, test_share) == "test") == (split_of(question, second, test_share) == "test")


def test_split_borders():
    assert {split_of(str(i), 0.0, 1.0) for i in range(100)} == {"test"}
    assert {split_of(str(i), 1.0, 0.0) for i in range(100)} == {"validation"}
    assert {split_of(str(i), 0.0, 0.0) for i in range(100)} == {"train"}


def test_shares_come_out():
    # 10,000 hashes: 0.03 is 7 standard deviations of the test share, so a false alarm has odds below 1e-11
    splits = [split_of(f"question {i}", 0.1, 0.25) for i in range(10_000)]
    for split, share in zip(SPLITS, (0.65, 0.1, 0.25), strict=True):
        assert abs(splits.count(split) / 10_000 - share) < 0.03


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.2), (0.5, 0.6), (float("nan"), 0.1), (0.0, 1.5)])
def test_bad_shares(validation, test):
    with pytest.raises(UserError, match="share"):
        sums(validation_share=validation, test_share=test)


def test_the_trap_is_real_and_seeds_do_not_separate_splits():
    from reasoning_gym import create_dataset

    older, newer = (create_dataset("chain_sum", seed=seed, size=50, **SUMS) for seed in (6, 7))
    assert [older[i + 1]["question"] for i in range(49)] == [newer[i]["question"] for i in range(49)]

    first, second = sums(num_items=2000, seed=0), sums(num_items=2000, seed=1)
    for task in (first, second):
        sets = [ids(task, split) for split in SPLITS]
        assert sum(map(len, sets)) == len(set.union(*sets)) == 2000
    held_out = ids(first, "validation") | ids(first, "test") | ids(second, "validation") | ids(second, "test")
    assert not (ids(first, "train") | ids(second, "train")) & held_out
    overlap = ids(first, "train") & ids(second, "train")
    assert overlap and len(overlap) < 700  # another seed draws other questions, not the same ones shifted by one


def test_generation_is_deterministic_and_ends_when_nothing_is_new():
    few = {"options": {**SUMS, "max_digits": 1}}
    task = sums(**few)
    counts = task.counts()
    assert counts["distinct"] == 200 == counts["train"] + counts["validation"] + counts["test"]
    assert counts["duplicates"] >= 3000  # three whole batches without anything new
    assert task.fingerprint() == sums(**few).fingerprint() != sums(**few, seed=1).fingerprint()
    assert all(eval(item.question.split(": ")[1].rstrip(" =")) == int(item.answer) for item in task.items("test"))
    train, validation, test = (counts[split] for split in SPLITS)
    assert task.describe() == f"200 distinct questions: {train} train, {validation} validation, {test} test"


def test_own_scorer_of_a_reasoning_gym_task():
    task = gym("graph_color", scorer="reasoning-gym", num_items=30)
    item = task.items("train")[0]
    coloring = json.dumps(item.metadata["possible_answer"])
    assert item.answer == ""  # many answers are right, the source gives none
    assert task.score(item, coloring) == {"strict": 1.0, "value_only": 1.0, "task_score": 1.0}
    assert task.score(item, f"Here you are:\n{coloring}")["strict"] == 0.0
    assert task.score(item, f"Here you are:\n{coloring}")["value_only"] == 1.0
    assert task.score(item, "no")["value_only"] == 0.0
    json.dumps(dict(item.metadata))

    tagged = sums(num_items=50, scorer="reasoning-gym", scorer_options={"style": "tags"})
    item = tagged.items("test")[0]
    assert tagged.score(item, f"<think>9</think><answer>{item.answer}</answer>")["strict"] == 1.0
    assert tagged.score(item, f"it is {item.answer}")["strict"] == 0.0
    assert tagged.score(item, f"it is {item.answer}")["value_only"] == 1.0


def test_a_reply_that_a_reasoning_gym_rule_cannot_read_is_wrong(monkeypatch):
    task = gym("prime_factorization", scorer="reasoning-gym", num_items=60)
    item = task.items("train")[0]
    assert task.score(item, item.answer)["strict"] == 1.0
    assert task.score(item, "The answer is 5 × 7") == {"strict": 0.0, "value_only": 0.0, "task_score": 0.0}

    def broken(*args):
        raise KeyError("lost")

    monkeypatch.setattr(type(task.scorer._source._dataset), "score_answer", broken)
    with pytest.raises(Exception, match="lost"):
        task.score(item, "5")  # the rule takes nothing any more, and that is no wrong answer


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("chain_sums", {}, "no task 'chain_sums'; did you mean .*chain_sum"),
        ("chain_sum", {"options": {"max_term": 2}}, "no option 'max_term', did you mean 'max_terms'"),
        ("chain_sum", {"options": {"min_terms": 9}}, r"min_terms = 9.*max_terms must be >= min_terms"),
        ("chain_sum", {"options": {"min_terms": "two"}}, "refuses its options"),
        ("chain_sum", {"options": {"seed": 1}}, "set by task.seed"),
        ("chain_sum", {"options": {"size": 1}}, "set by task.num_items"),
        ("chain_sum", {"num_items": 0}, "num_items must be at least 1, got 0"),
        ("chain_sum", {"num_items": 2}, "no questions left in the"),
        ("graph_color", {"num_items": 5}, "has no answer, which this scorer needs"),
        ("caesar_cipher", {"num_items": 5}, "is not a number"),
    ],
)
def test_bad_reasoning_gym_settings(name, settings, message):
    with pytest.raises(UserError, match=message):
        gym(name, **settings)
