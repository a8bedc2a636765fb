"""Prompts are measured in tokens before a run; items that do not fit can be left out, and that is recorded."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import ByteTask, quiet, start, tiny_config

from tinylora.errors import UserError
from tinylora.evaluation.compare import compare
from tinylora.reporting.page import write_report
from tinylora.reporting.report import read_run
from tinylora.rollouts.order import DataOrder
from tinylora.rollouts.runtime import open_runtime
from tinylora.store.run_folder import SKIPPED, RunFolder
from tinylora.system.jsonl import read_jsonl
from tinylora.tasks.base import Item, Message, Split
from tinylora.tasks.config import TaskConfig
from tinylora.tasks.split import question_id
from tinylora.training.train import resume, train

EMOJI = "😀" * 30 + "!"
"""31 characters, 121 tokens of bytes."""
pytestmark = pytest.mark.usefixtures("fresh_cache")


class SomeLong(ByteTask):
    """Emoji at some places of some splits; the others are longer in characters, and fit."""

    def __init__(self, places: dict[Split, Sequence[int]], size: int = 100) -> None:
        super().__init__(size)
        self.places = places

    def items(self, split: Split) -> Sequence[Item]:
        found = [self._of(f"{split[:2]} " + "x" * 30 + f" {i}") for i in range(self.size)]
        for place in self.places.get(split, ()):
            found[place] = self._of(f"{EMOJI}{split[:2]}{place}")
        return found

    def _of(self, text: str) -> Item:
        return Item(question_id(text), text, "even")


ANSWERED = {"train": {"steps": 1}, "eval": {"num_validation": 80, "num_test": 80, "random_vectors": 0}}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_prompts_are_measured_in_tokens_wherever_they_stand(tiny_folder: Path, tmp_path: Path, split: Split) -> None:
    """Only the 64 first and the 64 longest, in characters, were looked at."""
    with pytest.raises(UserError, match=r"a prompt of 1\d\d tokens leaves no room .*and 1 more.*task\.skip") as caught:
        start(tiny_folder, tmp_path / "runs", task=SomeLong({split: (75, 79)}), **ANSWERED)
    assert f"({split} item " in str(caught.value) and not (tmp_path / "runs").exists()


def test_items_that_do_not_fit_can_be_left_out_and_that_is_recorded(tiny_folder: Path, tmp_path: Path) -> None:
    task = SomeLong({"train": (75, 79), "validation": (1,), "test": (0, 90)})
    said: list[str] = []
    config = tiny_config(
        tiny_folder, task={"skip": ("too-long",)}, train={"steps": 2},
        eval={"num_validation": 2, "num_test": 2, "random_vectors": 0},
    )  # fmt: skip
    run = train(config, task, out=tmp_path / "runs", say=said.append).run
    rows = list(read_jsonl(run / SKIPPED))
    assert [row["split"] for row in rows] == ["train", "train", "validation", "test", "test"]
    assert all(row["question"].startswith(EMOJI) and "leaves no room" in row["why"] for row in rows)
    assert any("2 train, 1 validation, 2 test" in text for text in said)
    assert [dict(row) for row in read_run(run, "run").skipped] == rows
    page = write_report([run]).path.read_text(encoding="utf-8")
    assert "items left out" in page and rows[0]["item"][:12] in page
    asked = {row["item_id"] for row in read_jsonl(run / "result_items.jsonl")}
    assert asked == {task.items("test")[i].id for i in (1, 2)}


def test_a_run_that_has_come_to_such_an_item_goes_on_without_it(tiny_folder: Path, tmp_path: Path) -> None:
    """The other items come in the same order as if nothing were skipped."""
    whole = start(tiny_folder, tmp_path / "whole", task=SomeLong({}), train={"steps": 3, "keep": "last"})
    half = start(tiny_folder, tmp_path / "half", task=SomeLong({}), train={"steps": 2, "keep": "last"})
    used = {row["item"] for row in read_jsonl(whole.run / "samples.jsonl")}
    order = DataOrder(SomeLong({}).items("train"), 0).take(6)
    free = next(i for i, item in enumerate(SomeLong({}).items("train")) if item.id not in {one.id for _, one in order})
    broken = SomeLong({"train": (free,)})
    with pytest.raises(UserError, match=r"task\.skip"):
        resume(half.run, ["train.steps=3"], task=broken, say=quiet)
    done = resume(half.run, ["train.steps=3", 'task.skip=["too-long"]'], task=broken, say=quiet)
    assert torch.equal(done.v, whole.v) and used
    assert len(list(read_jsonl(half.run / SKIPPED))) == 1
    assert RunFolder.open(half.run).read_config().task.skip == ("too-long",)


def test_items_are_named_by_their_ids(tiny_folder: Path) -> None:
    task = SomeLong({"train": (3,)})
    named = task.items("train")[3].id, task.items("test")[5].id[:8]
    runtime = open_runtime(tiny_config(tiny_folder, task={"skip": named}), task=task, say=quiet)
    assert len(runtime.task.items("train")) == 99 and len(runtime.task.items("test")) == 99
    assert named[0] not in {item.id for item in runtime.task.items("train")}
    assert runtime.task.fingerprint() == task.fingerprint() and runtime.task.name == "bytes"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"task\.skip names 0123456789, and no item"):
        open_runtime(tiny_config(tiny_folder, task={"skip": ("0123456789",)}), task=task, say=quiet)
    with pytest.raises(UserError, match=r"task\.skip must be a list of too-long and of ids"):
        TaskConfig(skip=("long",))


def test_nothing_left_is_a_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    task = SomeLong({"validation": range(100)})
    with pytest.raises(UserError, match="leaves none of the 100 validation items: a prompt of"):
        train(tiny_config(tiny_folder, task={"skip": ("too-long",)}), task, out=tmp_path / "runs", say=quiet)


def test_an_evaluation_finds_a_prompt_that_does_not_fit_before_it_asks(tiny_folder: Path) -> None:
    """It answered the items before it, for as long as that took."""
    asked: list[int] = []
    for skip, count in (((), 0), (("too-long",), 99)):
        config = tiny_config(tiny_folder, task={"skip": skip}, generation={"max_batch_rows": 1, "max_new_tokens": 1})
        runtime = open_runtime(config, task=SomeLong({"test": (99,)}), say=quiet)
        generate = runtime.engine.generate

        def counted(requests: Any, ask: Any = generate) -> Any:
            asked.append(len(requests))
            return ask(requests)

        runtime.engine.generate = counted  # type: ignore[method-assign]
        v = runtime.adapter.zeros()
        if not skip:
            with pytest.raises(UserError, match="leaves no room for an answer"):
                compare(runtime, v, label="x", say=quiet)
        else:
            compare(runtime, v, label="x", say=quiet)
        assert sum(asked) == 2 * count


def test_the_cache_of_keys_and_values_counts_too(tiny_folder: Path, tmp_path: Path) -> None:
    """The engine said so when it came to the item."""
    block = 2 * 3 * 2 * 8 * 4 * 64  # keys and values, layers, heads, their size, float32, tokens; plus what is beside
    budget = 1.9 * block / 2**30
    with pytest.raises(UserError, match=r"more memory than generation\.kv_budget_gib"):
        start(tiny_folder, tmp_path / "runs", task=SomeLong({}), generation={"kv_budget_gib": budget})


def test_sft_measures_prompt_and_reply_together(tiny_folder: Path, tmp_path: Path) -> None:
    class LongReplies(ByteTask):
        def items(self, split: Split) -> Sequence[Item]:
            found = list(super().items(split))
            last = found[-1]
            found[-1] = replace(last, answer="long " + "a" * 100)
            return found

        def score(self, item: Item, text: str) -> dict[str, float]:
            return {"strict": 1.0, "value_only": 1.0}

    config = {"train": {"steps": 1, "algorithm": "sft"}}
    with pytest.raises(UserError, match=r"reference reply of 106 do not fit in the 128 .*'qtr79'.*task\.skip"):
        start(tiny_folder, tmp_path / "runs", task=LongReplies(80), **config)
    assert not (tmp_path / "runs").exists()
    skipping = tiny_config(tiny_folder, **config, task={"skip": ("too-long",)})
    run = train(skipping, LongReplies(80), out=tmp_path, say=quiet).run
    (row,) = read_jsonl(run / SKIPPED)
    assert row["question"] == "qtr79" and "reference reply" in row["why"]


def test_what_is_worth_saying_of_prompts_is_said_before_a_run(tiny_folder: Path, tmp_path: Path) -> None:
    class Odd(ByteTask):
        def items(self, split: Split) -> Sequence[Item]:
            return [replace(item, question=item.question + "<|im_end|>") for item in super().items(split)]

        def prompt(self, item: Item) -> list[Message]:
            return [{"role": "user", "content": item.question}]

    for chat, told in ((True, "letters like others"), (False, "count as such without a chat template")):
        said: list[str] = []
        config = tiny_config(tiny_folder, train={"steps": 1}, prompt={"chat": chat})
        train(config, Odd(), out=tmp_path, say=said.append)
        (text,) = [text for text in said if "<|im_end|>: control tokens" in text]
        assert told in text and "(in 7 of 7 prompts)" in text


def test_a_model_whose_replies_cannot_end_is_told_before_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    (tiny_folder / "generation_config.json").unlink(missing_ok=True)
    for name in ("tokenizer_config.json", "config.json", "special_tokens_map.json"):
        if (file := tiny_folder / name).exists():
            table = json.loads(file.read_text())
            table.pop("eos_token", None)
            table.pop("eos_token_id", None)
            file.write_text(json.dumps(table | ({"eos_token_id": None} if name == "config.json" else {})))
    said: list[str] = []
    steps = {"train": {"steps": 6}, "eval": {"every": 0}}
    train(tiny_config(tiny_folder, **steps), ByteTask(), out=tmp_path, say=said.append)
    begins = next(i for i, text in enumerate(said) if text.startswith("training "))
    assert any("has no token that ends a reply" in text and "eos_token" in text for text in said[:begins])
    assert not any("raise generation.max_new_tokens" in text for text in said)
    assert any("nothing ends a reply of this model" in text for text in said)
