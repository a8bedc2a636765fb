"""Public sets: items, splits, default prompts and scorers on small files, and what they say to bad input."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tinylora.config.recipe import parse_recipe
from tinylora.config.run import RunConfig
from tinylora.config.schema import dump_config
from tinylora.errors import UserError
from tinylora.evaluation.settings import settings_for_eval
from tinylora.tasks import build_task
from tinylora.tasks.config import PromptConfig, TaskConfig
from tinylora.tasks.sets.banking77_labels import LABELS
from tinylora.tasks.sets.public_sets import PUBLIC
from tinylora.tasks.sets.slots import SlotsScorer

THREE = '["card_arrival", "card_linking", "age_limit"]'


def folder(tmp_path, test, train=None):
    for name, rows in (("test", test), ("train", train)):
        if rows is not None:
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def suite(name, path, more=""):
    config = parse_recipe(f'[task]\nname = "{name}"\npath = "{path}"\n{more}', "test")
    return build_task(config.task, config.prompt)


def bank(num=40):
    return [{"text": f"Message {i}, please!", "label": LABELS[i % 4]} for i in range(num)]


def booking(text, asked=(), **slots):
    return {"text": text, "requested_slots": list(asked), "slots": slots}


@pytest.mark.parametrize("name", ["math500", "aime24", "aime25", "amc23"])
def test_mathematics_is_for_evaluation_only(tmp_path, name):
    rows = [{"question": "1 + 1?", "answer": "2"}, {"problem": "2 + 2?", "answer": 4}, {"problem": "3?", "answer": 3.0}]
    task = suite(name, folder(tmp_path, [*rows, rows[0]]))
    assert [item.answer for item in task.items("test")] == ["2", "4", "3"]
    assert task.counts()["duplicates"] == 1
    assert "\\boxed{}" in task.prompt(task.items("test")[0])[0]["content"]
    assert task.score(task.items("test")[1], "So \\boxed{4}.")["strict"] == 1.0
    for split in ("train", "validation"):
        with pytest.raises(UserError, match=f"task {name} is for evaluation only"):
            task.items(split)


def test_banking77(tmp_path):
    train = bank()
    test = [{"text": "message 3 please", "label": LABELS[3]}, {"text": "Where is it?", "label": "card_arrival"}]
    task = suite("banking77", folder(tmp_path, test, [*train, train[0]]))
    counts = task.counts()
    assert (counts["test"], counts["duplicates"], counts["overlaps"]) == (2, 1, 1)  # case and punctuation ignored
    assert counts["train"] + counts["validation"] == 39
    asked = task.prompt(task.items("test")[0])[0]["content"]
    assert set(LABELS) <= set(asked.split()) and "message 3 please" in asked
    assert task.score(task.items("test")[1], " card_arrival\n") == {"strict": 1.0, "value_only": 1.0}
    assert task.score(task.items("test")[1], "It is card_arrival.") == {"strict": 0.0, "value_only": 1.0}


def test_banking77_labels(tmp_path):
    path = folder(tmp_path, bank(8), bank(200)[8:])
    task = suite("banking77", path, f"options = {{labels = {THREE}}}")
    assert {item.answer for split in ("train", "test") for item in task.items(split)} == {
        "card_arrival",
        "card_linking",
    }
    listed = task.prompt(task.items("test")[0])[0]["content"].split()
    assert set(LABELS) & set(listed) == {"card_arrival", "card_linking", "age_limit"}
    for options, message in (
        ('{labels = ["card_arival", "age_limit"]}', "no label 'card_arival'; did you mean card_arrival"),
        ('{labels = ["age_limit"]}', "at least 2 labels"),
        ('{labels = ["age_limit", "age_limit"]}', "each once"),
        ("{labels = 3}", "must be a list of label names"),
        ("{label = 3}", "no option 'label'; it has: labels"),
    ):
        with pytest.raises(UserError, match=message):
            suite("banking77", path, f"options = {options}")
    with pytest.raises(UserError, match="no questions left in the"):
        suite("banking77", path, 'options = {labels = ["age_limit", "pin_blocked"]}')
    with pytest.raises(UserError, match=r"does not list the label card_linking \(1 are missing\)"):
        more = f"options = {{labels = {THREE}}}\n[prompt]\ntemplate = 'card_arrival, age_limit: {{question}}'"
        suite("banking77", path, more)
    folder(tmp_path, [{"text": "a", "label": "fishing"}])
    with pytest.raises(UserError, match=r"test\.jsonl, line 1: 'fishing' is no label of banking77"):
        suite("banking77", path)


def test_restaurant8k(tmp_path):
    train = [booking(f"A table for {i}", people=str(i)) for i in range(40)]
    test = [booking("13", ["time"], time="13"), booking("13", ["people"], people="13"), booking("Hello.")]
    task = suite("restaurant8k", folder(tmp_path, test, [*train, booking("13!", people="13")]))
    assert (task.counts()["test"], task.counts()["overlaps"]) == (3, 1)
    first, second, third = task.items("test")
    assert "just asked for: time" in first.question and first.id != second.id
    assert task.score(first, '{"time": "13"}')["strict"] == 1.0 and task.score(third, "{}")["strict"] == 1.0
    assert "last_name" in task.prompt(first)[0]["content"]
    folder(tmp_path, [{"text": "a", "slots": {"colour": "red"}}])
    with pytest.raises(UserError, match="line 1: .* must be among date, time"):
        suite("restaurant8k", tmp_path)
    folder(tmp_path, [{"text": "a"}])
    with pytest.raises(UserError, match="'slots' must be an object of texts"):
        suite("restaurant8k", tmp_path)
    with pytest.raises(UserError, match=r"not loaded from the hub; set task\.path to a folder"):
        suite("restaurant8k", "")


@pytest.mark.parametrize(
    ("reply", "strict", "value_only", "slots"),
    [
        ('{"time": "7 pm", "people": "2"}', 1, 1, 1),
        (' {"people": "2", "time": "7 pm"}\n', 1, 1, 1),
        ('```json\n{"time": "7 PM.", "people": 2}\n```', 0, 1, 1),
        ("{'time': '7 pm', 'people': '2', 'date': null,}", 0, 1, 1),
        ('{"time": "7 pm", "people": "2", "date": "today"}', 0, 0, 2 / 3),
        ('{"time": "7 pm"}', 0, 0, 1 / 2),
        ('{"time": "7 pm", "people": "2"} {}', 0, 0, 0),
        ("At 7 pm, for 2", 0, 0, 0),
        ("{" * 5000, 0, 0, 0),
    ],
)
def test_slots(reply, strict, value_only, slots):
    given = SlotsScorer().score('{"time": "7 pm", "people": "2"}', reply)
    assert given == {"strict": strict, "value_only": value_only, "slots": pytest.approx(slots)}


def test_no_slots_at_all():
    assert SlotsScorer().score("{}", "{}") == {"strict": 1.0, "value_only": 1.0, "slots": 1.0}
    assert SlotsScorer().score("{}", '{"date": null}') == {"strict": 0.0, "value_only": 1.0, "slots": 1.0}
    with pytest.raises(UserError, match="is no JSON object of texts"):
        SlotsScorer().check_answer('{"time": 7}')


def test_missing_files_and_fields(tmp_path):
    with pytest.raises(UserError, match=r"no .*test\.jsonl; task\.path must be a folder with test\.jsonl, or empty"):
        suite("aime24", tmp_path)
    folder(tmp_path, [{"question": "a"}])
    with pytest.raises(UserError, match=r"line 1: there is no 'answer'"):
        suite("aime24", tmp_path)
    folder(tmp_path, [])
    with pytest.raises(UserError, match=r"test\.jsonl is empty"):
        suite("aime24", tmp_path)
    with pytest.raises(UserError, match="aime24 has none; got level"):
        suite("aime24", tmp_path, "options = {level = 1}")


def test_from_the_hub(monkeypatch):
    def load_dataset(name, config, split):
        assert (name, config, split) == ("HuggingFaceH4/aime_2024", None, "train")
        return [{"problem": "a?", "answer": "33"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert suite("aime24", "").items("test")[0].answer == "33"


def test_a_recipe_keeps_what_it_writes():
    config = parse_recipe('[task]\nname = "aime24"', "x")
    assert (config.task.scorer, config.generation.max_new_tokens) == ("boxed", 4096)
    text = '[task]\nname = "aime24"\nscorer = "number"\n[prompt]\nsystem = "Brief."\n[generation]\nmax_new_tokens = 9'
    config = parse_recipe(text, "x")
    assert (config.task.scorer, config.prompt, config.generation.max_new_tokens) == (
        "number", PromptConfig(system="Brief."), 9,
    )  # fmt: skip
    bare = RunConfig(task=TaskConfig(name="gsm8k"))  # made in Python, so nothing is filled in
    assert parse_recipe(dump_config(bare), "x") == bare  # nor in what a run has written down


def test_eval_takes_prompt_and_budget_of_a_set():
    config = settings_for_eval(RunConfig(), "banking77", ["task.path=here"])
    assert (config.task.scorer, config.task.path, config.generation.max_new_tokens) == ("exact", "here", 32)
    assert "age_limit" in config.prompt.template


def test_every_set_is_documented():
    docs = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    for public in PUBLIC.values():
        assert f"| `{public.name}` |" in docs and public.licence
