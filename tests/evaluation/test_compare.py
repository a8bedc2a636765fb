"""The paired comparison against statsmodels, and the workflow on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from tinylora.adapter.config import AdapterConfig
from tinylora.config.recipe import load_recipe
from tinylora.config.run import GenerationConfig, ModelConfig, RunConfig, TrainConfig
from tinylora.errors import UserError
from tinylora.evaluation.compare import compare, from_results
from tinylora.evaluation.settings import check_base_kept, check_held_out, other_protocol, settings_for_eval
from tinylora.generation.types import Completion, Request
from tinylora.rollouts.replies import Reply
from tinylora.rollouts.runtime import Runtime, open_runtime
from tinylora.serving.chat import ChatReply, ReplyPair, format_pair, reply_pair
from tinylora.tasks.build import build_task
from tinylora.tasks.config import PromptConfig, TaskConfig


def quiet(text: str) -> None:
    pass


def result(i: int, strict: float, value_only: float, stopped: bool) -> Reply:
    return Reply(f"{i:064x}", f"q{i}", "a", "text", strict, value_only, stopped, 3 + stopped, {"strict": strict})


@pytest.fixture
def runtime(tiny_folder: Path, fresh_cache: Path, tmp_path: Path) -> Runtime:
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(f'{{"question": "{a} + {b}", "answer": "{a + b}"}}\n' for a in range(8) for b in range(8)))
    config = RunConfig(
        model=ModelConfig(name=str(tiny_folder), device="cpu", dtype="float32"),
        adapter=AdapterConfig(n_tie=8),
        task=TaskConfig(name="jsonl", path=str(file)),
        generation=GenerationConfig(max_new_tokens=6),
        train=TrainConfig(num_threads=1),
    )
    return open_runtime(config, say=quiet)


def test_measures_agree_with_statsmodels() -> None:
    rng = np.random.default_rng(0)
    base = [result(i, float(rng.random() < 0.3), float(rng.random() < 0.5), rng.random() < 0.6) for i in range(200)]
    tuned = [result(i, float(rng.random() < 0.45), float(rng.random() < 0.5), rng.random() < 0.9) for i in range(200)]
    compared = from_results("a against b", base, tuned)
    for name in ("strict", "value_only", "stopped"):
        before = np.array([getattr(r, name) >= 1 for r in base])
        after = np.array([getattr(r, name) >= 1 for r in tuned])
        table = [[(before & after).sum(), (before & ~after).sum()], [(~before & after).sum(), (~before & ~after).sum()]]
        got = compared.to_json()[name]
        assert got["p_value"] == pytest.approx(mcnemar(table, exact=True).pvalue, rel=1e-9)
        assert (got["won"], got["lost"]) == (table[1][0], table[0][1])
        assert got["tuned"]["correct"] == after.sum()
        assert got["base"]["interval"] == pytest.approx(
            proportion_confint(before.sum(), 200, method="wilson"), rel=1e-9
        )
    assert compared.text().splitlines()[0] == "a against b"
    assert f"{compared.strict.tuned.correct}/200" in compared.text()


def test_part_of_a_point_is_not_right() -> None:
    compared = from_results("x", [result(0, 0.5, 1.0, True)], [result(0, 1.0, 1.0, True)])
    assert (compared.strict.base.correct, compared.strict.tuned.correct, compared.strict.won) == (0, 1, 1)


def test_other_items_are_refused() -> None:
    one, two = result(1, 1, 1, True), result(2, 1, 1, True)
    with pytest.raises(UserError, match="same items in the same order"):
        from_results("x", [one, two], [two, one])


def test_compare_is_two_answers(runtime: Runtime) -> None:
    v = torch.full((runtime.adapter.num_groups, 1), 0.3)
    said: list[str] = []
    compared = compare(runtime, v, label="runs/x", num_items=5, say=said.append)
    items = runtime.task.items("test")[:5]
    for vector, got in ((None, compared.untrained), (v, compared.adapter)):
        assert list(got) == runtime.answer(items, vector)
    assert [r.text for r in compared.untrained] != [r.text for r in compared.adapter]
    assert (
        "runs/x (3 trained numbers" in compared.headline and "same 5 test items of jsonl, greedy" in compared.headline
    )
    assert said[0] == compared.headline


def test_a_vector_of_another_adapter_is_refused(runtime: Runtime) -> None:
    with pytest.raises(UserError, match="does not fit"):
        compare(runtime, torch.zeros(5, 1), label="x", say=quiet)


def test_settings_for_eval() -> None:
    trained = RunConfig(
        model=ModelConfig(device="cuda", revision="abc", name="a/b"),
        task=TaskConfig(options={"max_terms": 3}),
        prompt=PromptConfig(system="Be brief."),
        train=TrainConfig(num_threads=64),
    )
    same = settings_for_eval(trained)
    assert (same.model.device, same.train.num_threads, same.model.revision) == ("auto", 0, "abc")
    assert same.task == settings_for_eval(trained, trained.task.name).task == trained.task
    other = settings_for_eval(trained, "gsm8k", ["task.scorer=boxed"])
    assert (other.task.name, other.task.options, other.task.scorer) == ("gsm8k", {}, "boxed")
    # Its prompt and budget were made for other questions.
    assert (other.model.name, other.prompt.system, other.generation.max_new_tokens) == ("a/b", "", 512)
    demo = load_recipe("demo")
    for task in ("gsm8k", "jsonl", "reasoning_gym:bitwise_arithmetic", "banking77"):
        there = settings_for_eval(demo, task)
        assert demo.prompt.pattern and not there.prompt.pattern and not there.prompt.few_shot
    assert other_protocol(demo, settings_for_eval(demo)) == []
    changes = ["task.test_share=0.5", "prompt.system=x", "generation.max_new_tokens=3", "optim.lr=1"]
    assert other_protocol(demo, settings_for_eval(demo, overrides=changes)) == [
        "task.test_share", "prompt.system", "generation.max_new_tokens"
    ]  # fmt: skip
    assert settings_for_eval(trained, "demo").prompt != trained.prompt  # a recipe brings its prompt
    with pytest.raises(UserError, match="no recipe is named 'nothing'"):
        settings_for_eval(trained, "nothing")
    with pytest.raises(UserError, match="adapter settings cannot be changed"):
        check_base_kept(trained, replace(trained, adapter=AdapterConfig(rank=3)))
    with pytest.raises(UserError, match="the method of a trained adapter cannot be changed"):
        check_base_kept(trained, settings_for_eval(trained, overrides=["method.alpha=64"]))


def test_questions_of_training_are_no_test_items(tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl"
    rows = [{"question": f"{a} + {b}", "answer": str(a + b)} for a in range(9) for b in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = RunConfig(task=TaskConfig(name="jsonl", path=str(file), test_share=0.25))
    config = settings_for_eval(trained, overrides=["task.test_share=0.6"])
    before, now = (build_task(one.task, one.prompt) for one in (trained, config))
    known = {item.question for item in now.items("test")} - {item.question for item in before.items("test")}
    said: list[str] = []
    with pytest.raises(UserError, match=f"{len(known)} of these {len(now.items('test'))} test items are among those"):
        check_held_out(trained, config, now.items("test"), said.append)
    check_held_out(trained, config, [item for item in now.items("test") if item.question not in known], said.append)
    check_held_out(trained, trained, before.items("test"), said.append)
    check_held_out(trained, settings_for_eval(trained, "writing"), now.items("test"), said.append)
    assert not said
    file.rename(tmp_path / "moved.jsonl")
    check_held_out(trained, config, now.items("test"), said.append)
    assert "whether the run was trained on these test items is not known" in said[0]


def test_both_reply_to_the_same_prompt(runtime: Runtime) -> None:
    v = torch.full((runtime.adapter.num_groups, 1), 0.3)
    pair = reply_pair(runtime, v, "3 + 4", max_new_tokens=8)
    assert pair.untrained != pair.adapter
    zero = reply_pair(runtime, torch.zeros_like(v), "3 + 4", max_new_tokens=8, temperature=1.0, seed=5)
    assert zero.untrained == zero.adapter  # same random numbers, so only v can make a difference
    assert zero.untrained == reply_pair(runtime, v, "3 + 4", max_new_tokens=8, temperature=1.0, seed=5).untrained


def test_a_line_that_the_pattern_does_not_match_is_taken_as_it_is(runtime: Runtime) -> None:
    v = torch.full((runtime.adapter.num_groups, 1), 0.3)
    runtime.config = replace(runtime.config, prompt=PromptConfig(pattern=r"problem: (.*)$"))
    typed = reply_pair(runtime, v, "3 + 4", max_new_tokens=8)
    question = reply_pair(runtime, v, "Solve this problem: 3 + 4", max_new_tokens=8)
    assert (typed.untrained, typed.adapter) == (question.untrained, question.adapter)


def test_the_recipe_prompt_is_used_unless_plain(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.config = replace(runtime.config, prompt=PromptConfig(system="zzzz", template="Q: {question}"))
    prompts: list[str] = []
    generate = runtime.engine.generate

    def recording(requests: list[Request]) -> list[Completion]:
        prompts.append(str(runtime.base.tokenizer.decode(list(requests[0].prompt_ids))))
        assert requests[0].prompt_ids == requests[1].prompt_ids and requests[0].v is None
        return generate(requests)

    monkeypatch.setattr(runtime.engine, "generate", recording)
    v = runtime.adapter.zeros()
    reply_pair(runtime, v, "3 + 4", max_new_tokens=2)
    reply_pair(runtime, v, "3 + 4", max_new_tokens=2, plain=True)
    assert "zzzz" in prompts[0] and "Q: 3 + 4" in prompts[0]
    assert "3 + 4" in prompts[1] and "zzzz" not in prompts[1] and "Q: " not in prompts[1]


def test_columns() -> None:
    pair = ReplyPair(
        prompt="p",
        untrained=ChatReply(text="one two three four five six seven", num_tokens=7, stopped=False),
        adapter=ChatReply(text="", num_tokens=1, stopped=True),
    )
    lines = format_pair(pair, width=81).splitlines()
    assert "untrained (7 tokens, cut off)" in lines[0] and "adapted (1 tokens)" in lines[0]
    assert all(line.index("|") == 40 for line in lines)
    assert "(nothing)" in lines[2]
