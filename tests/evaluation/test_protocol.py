"""The protocol hash changes with everything that decides a score, and with nothing else; stop strings; the presets."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import ByteTask, quiet, tiny_config

from tinylora.config.recipe import load_recipe
from tinylora.config.run import GenerationConfig, RunConfig
from tinylora.errors import UserError
from tinylora.evaluation.compare import compare
from tinylora.evaluation.protocol import items_fingerprint, protocol_hash, protocol_of
from tinylora.evaluation.settings import settings_for_eval
from tinylora.rollouts.replies import cut_at, stop_at
from tinylora.rollouts.runtime import open_runtime
from tinylora.tasks.base import Item
from tinylora.tasks.build import build_task, make_scorer
from tinylora.tasks.config import PromptConfig, TaskConfig
from tinylora.tasks.prompt import Prompt

SETTINGS = {
    "task": "gsm8k", "data": "abc", "prompt": PromptConfig(), "chat": True, "scorer": "boxed", "scorer_options": {},
    "max_new_tokens": 64, "temperature": 0.0, "seed": 0, "stop_strings": (),
}  # fmt: skip
PRESETS = ("gsm8k-qwen-boxed", "math500-qwen-boxed", "gsm8k-lm-eval")


def test_hash_is_the_one_that_was_published() -> None:
    # SHA-256 by coreutils of the JSON written by hand: a change of the canonical form makes old hashes worthless
    assert protocol_hash(**SETTINGS) == "bcd852faf94d7fb0"


def test_hash_changes_with_each_setting_and_only_with_them() -> None:
    changes = [
        {"task": "math500"}, {"data": "abd"}, {"chat": False}, {"scorer": "number"}, {"scorer_options": {"style": "a"}},
        {"max_new_tokens": 65}, {"temperature": 0.5}, {"temperature": 0.5, "seed": 1}, {"stop_strings": ["Question:"]},
        {"prompt": PromptConfig(system="x")}, {"prompt": PromptConfig(template="x {question}")},
        {"prompt": PromptConfig(pattern="(x)")},
        {"prompt": PromptConfig(few_shot=({"question": "a", "answer": "b"},))},
    ]  # fmt: skip
    hashes = {protocol_hash(**{**SETTINGS, **change}) for change in [{}, *changes]}
    assert len(hashes) == len(changes) + 1
    assert protocol_hash(**{**SETTINGS, "seed": 7}) == protocol_hash(**SETTINGS)  # greedy draws nothing


def test_fingerprint_is_of_the_items_asked() -> None:
    a, b = Item("1", "1 + 1?", "2"), Item("2", "2 + 2?", "4")
    prints = {items_fingerprint(items) for items in ([a], [a, b], [b, a], [replace(a, answer="3")])}
    assert len(prints) == 4
    assert items_fingerprint([a]) == items_fingerprint([replace(a, metadata={"level": 1})])


def rows(path: Path, **fields: Any) -> Path:
    lines = [{"question": f"Add {i}.", "answer": "x", "tests": [f"assert f(1) == {i}"], **fields} for i in range(9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("changed", [{"tests": ["assert f(2) == 2"]}, {"setup": "x = 1"}])
def test_tests_that_the_scorer_reads_are_in_the_fingerprints(tmp_path: Path, changed: dict[str, Any]) -> None:
    """Other tests under the same questions gave the same protocol hash, and a resumed run did not see them."""
    options = {"unsafe_without_namespaces": True}

    def prints(**fields: Any) -> tuple[str, dict[str, str], str]:
        path = str(rows(tmp_path / "data.jsonl", **fields))
        config = RunConfig(task=TaskConfig(name="jsonl", path=path, scorer="python-tests", scorer_options=options))
        task = build_task(config.task, config.prompt)
        return protocol_of(config, task, task.items("train")), task.scorer_prints(), task.fingerprint()

    before, after, other = prints(), prints(**changed), prints(level=3)
    assert before[0] != after[0] and before[1] != after[1]
    assert before == other  # a field that nothing reads
    assert before[2] == after[2]  # of questions and answers, as in checkpoints of older versions


def test_code_of_a_scorer_is_in_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = str(rows(tmp_path / "data.jsonl"))
    Path("counted.py").write_text("def weight():\n    return 1.0\n")
    Path("unrelated.py").write_text("")
    Path("my_hashed_scorer.py").write_text(
        "import json\nfrom counted import weight\ndef score(item, text):\n    return weight()\n"
    )
    config = RunConfig(task=TaskConfig(name="jsonl", path=path, scorer="my_hashed_scorer:score"))
    task = build_task(config.task, config.prompt)
    items = task.items("train")

    def now() -> tuple[str, str]:
        return protocol_of(config, task, items), task.scorer_prints()["scorer_code"]

    first = now()
    Path("unrelated.py").write_text("x = 1\n")
    assert now() == first and len(first[1]) == 64
    Path("counted.py").write_text("def weight():\n    return 0.5\n")
    second = now()
    Path("my_hashed_scorer.py").write_text("def score(item, text):\n    return 0.0\n")
    assert len({first, second, now()}) == 3
    rows(tmp_path / "data.jsonl", level=3)  # a function is given all fields
    task, before = build_task(config.task, config.prompt), task.scorer_prints()["scorer_reads"]
    assert task.scorer_prints()["scorer_reads"] != before


def test_stop_strings(tiny_folder: Path, fresh_cache: Path) -> None:
    runtime = open_runtime(tiny_config(tiny_folder), task=ByteTask(), say=quiet)
    items = runtime.task.items("test")[:4]
    v = torch.full((runtime.adapter.num_groups, runtime.adapter.config.u), 0.1)

    def answers(stops: tuple[str, ...]):
        generation = replace(runtime.config.generation, stop_strings=stops)
        other = replace(runtime, config=replace(runtime.config, generation=generation))
        return other.answer(items, v, max_new_tokens=12)

    free = answers(())
    at = next(i for i, one in enumerate(free) if len(one.text) > 4 and not one.stopped)
    stop = free[at].text[2:4]
    for before, after in zip(free, answers((stop, "not there")), strict=True):
        assert after.text == cut_at(before.text, [stop])
        assert after.stopped or stop not in before.text
    stopped = answers((stop,))[at]
    assert stopped.stopped and stopped.num_tokens < free[at].num_tokens and stop not in stopped.text
    assert stop_at(runtime.base, ()) is None


def test_cut_at_takes_the_first_place() -> None:
    assert cut_at("a Question: b </s>", ["</s>", "Question:"]) == "a "
    assert cut_at("a", ["b"]) == "a" == cut_at("a", [])
    with pytest.raises(UserError, match=r"generation\.stop_strings must be texts that are not empty"):
        GenerationConfig(stop_strings=("",))


def test_compare_says_its_protocol(tiny_folder: Path, fresh_cache: Path) -> None:
    runtime = open_runtime(tiny_config(tiny_folder), task=ByteTask(), say=quiet)
    v = torch.zeros(runtime.adapter.num_groups, runtime.adapter.config.u)
    found = {n: compare(runtime, v, label="x", num_items=n, say=quiet).to_json()["protocol"] for n in (2, 3)}
    assert found[2] == protocol_of(runtime.config, runtime.task, runtime.task.items("test")[:2])
    assert found[2] != found[3]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_go_with_eval(name: str) -> None:
    preset = load_recipe(name)
    config = settings_for_eval(RunConfig(), name, ["task.path=here"])
    assert (config.prompt, config.task.scorer, config.task.path) == (preset.prompt, preset.task.scorer, "here")
    assert config.generation == replace(
        RunConfig().generation,
        max_new_tokens=preset.generation.max_new_tokens,
        stop_strings=preset.generation.stop_strings,
    )


def test_lm_eval_preset() -> None:
    preset = load_recipe("gsm8k-lm-eval")
    text = Prompt(preset.prompt).messages("What is 3 + 4?")[0]["content"]
    assert text.count("Question: ") == 6 and text.endswith("\n\nQuestion: What is 3 + 4?\nAnswer:")
    scorer = make_scorer("regex", preset.task.scorer_options)
    item = Item("1", "a", "1000")
    for reply, strict, value_only in (
        (" It is 1000.\n#### 1,000", 1, 1),
        ("#### 1000.", 1, 1),
        ("#### 1000.50", 0, 0),
        ("#### -1000", 0, 0),
        ("It is 1000.", 0, 1),
        ("#### $1000", 0, 1),
        ("#### -$1000", 0, 0),  # no number for the harness's filter, and -1000 for its other one
    ):
        assert scorer.score_item(item, reply) == {"strict": strict, "value_only": value_only}, reply
