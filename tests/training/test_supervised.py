"""sft and rft against plain cross-entropy, and what they refuse."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import ByteTask, metrics_of, quiet, start, tiny_config
from tiny_tokenizer import CHAT_TEMPLATE
from transformers import AutoModelForCausalLM

from tinylora.errors import UserError
from tinylora.learner.learner import Learner
from tinylora.rollouts.groups import Group
from tinylora.rollouts.order import DataOrder
from tinylora.rollouts.replies import Reply
from tinylora.rollouts.runtime import open_runtime
from tinylora.tasks.base import Item, Message, Split
from tinylora.training.rft import right_rows
from tinylora.training.sft import (
    check_references,
    reference_reply,
    reference_rows,
)
from tinylora.training.supervised import supervised_step
from tinylora.training.train import resume
from tinylora.training.update import make_optimizer


class EchoTask:
    """Reply with the question's last character doubled; the answer says so."""

    name = "echo"

    def items(self, split: Split) -> Sequence[Item]:
        return [Item(f"{split}{i}", f"{split[:2]}{i}", f"{i}{i}", {"solution": f"twice {i}"}) for i in range(8)]

    def prompt(self, item: Item) -> list[Message]:
        return [{"role": "user", "content": f"say {item.question}"}]

    def parse(self, text: str) -> str | None:
        return text or None

    def score(self, item: Item, text: str) -> dict[str, float]:
        right = float(text == item.answer)
        return {"strict": right, "value_only": right}


def test_the_target_is_written_from_the_item() -> None:
    task = EchoTask()
    item = task.items("train")[3]
    assert reference_reply(task, item, "{question} = {answer}") == "say tr3 = 33"
    assert reference_reply(task, item, "{solution}, \\boxed{{answer}}") == "twice 3, \\boxed{33}"
    bare = Item("x", "q", "a")
    with pytest.raises(UserError, match=r"sft\.target asks for \{solution\}"):
        reference_reply(task, bare, "{solution}")
    with pytest.raises(
        UserError, match=r"asks for \{solutoin\}, and the question 'q' has none; it has answer, question"
    ):
        reference_reply(task, bare, "{solutoin}\n#### {answer}")
    latex = "$\\frac{a}{b} \\mathrm{cm}$ {1, 2} \\boxed{{answer}}"
    assert reference_reply(task, bare, latex) == "$\\frac{a}{b} \\mathrm{cm}$ {1, 2} \\boxed{a}"
    told = Item("x", "q", "a", {"steps": 3, "why": "{answer}", "none": None})
    assert reference_reply(task, told, "{steps} {why} {answer}") == "3 {answer} a"  # what is filled in stays as it is
    with pytest.raises(UserError, match=r"asks for \{none\}"):
        reference_reply(task, told, "{none}")


def test_the_loss_is_the_mean_cross_entropy_of_the_replies(tiny_folder: Path, fresh_cache: Path) -> None:
    runtime = open_runtime(
        tiny_config(tiny_folder, train={"algorithm": "sft", "micro_batch_tokens": 40}), task=EchoTask(), say=quiet
    )
    rows = reference_rows(runtime, DataOrder(EchoTask().items("train"), 0))
    assert len(rows) == 4  # prompts_per_step x group_size
    v = runtime.adapter.zeros().requires_grad_()
    learner = Learner(runtime.base.model, runtime.adapter, pad_token_id=runtime.base.pad_token_id)
    done = supervised_step(learner, rows, v, make_optimizer(v, runtime.config), runtime.config, 0)

    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.token_ids]])
        labels = ids.clone()
        labels[0, : len(row.prompt_ids)] = -100
        with torch.no_grad():
            total += float(model(ids, labels=labels).loss) * len(row.token_ids)
        tokens += len(row.token_ids)
        text = runtime.base.tokenizer.decode(row.token_ids[:-1])
        assert len(text) == 2 and text[0] == text[1]
        assert row.token_ids[-1] == runtime.base.stop_token_ids[0]
    assert done.loss == pytest.approx(total / tokens, rel=1e-4)
    assert done.tokens == tokens
    assert v.detach().abs().min() > 0  # Adam has moved every number


def test_a_reply_ends_with_the_token_that_ends_a_turn(tiny_folder: Path, fresh_cache: Path) -> None:
    """Of Gemma-3-it, <end_of_turn> and not the tokenizer's <eos>, which was taught once: neither its template nor its
    own replies ever hold it."""

    def ends(template: str | None, stops: tuple[int, ...], chat: bool = True) -> set[int]:
        config = tiny_config(tiny_folder, train={"algorithm": "sft"}, prompt={"chat": chat})
        runtime = open_runtime(config, task=EchoTask(), say=quiet)
        runtime.base.tokenizer.chat_template = template
        runtime.base = replace(runtime.base, stop_token_ids=stops, has_chat_template=template is not None)
        check_references(runtime, quiet)
        return {row.token_ids[-1] for row in reference_rows(runtime, DataOrder(EchoTask().items("train"), 0))}

    eos, end_of_turn = 0, 2  # <|endoftext|>, <|im_end|>
    assert ends(CHAT_TEMPLATE, (eos, end_of_turn)) == {end_of_turn}
    assert ends(CHAT_TEMPLATE + "<|endoftext|>", (eos, end_of_turn)) == {end_of_turn}  # as Phi-3's
    assert ends(CHAT_TEMPLATE, (end_of_turn, eos)) == {end_of_turn}  # as SmolLM2's and Qwen's
    assert ends(CHAT_TEMPLATE, (eos,)) == {eos}  # a base model whose template ends turns with what does not stop it
    assert ends(CHAT_TEMPLATE, (eos, end_of_turn), chat=False) == {eos}
    with_system_only = "{{ raise_exception('no assistant here') if messages[-1].role == 'assistant' }}" + CHAT_TEMPLATE
    assert ends(with_system_only, (eos, end_of_turn)) == {eos}
    assert ends(None, (eos, end_of_turn), chat=False) == {eos}
    with pytest.raises(UserError, match="has no token that ends a reply"):
        ends(CHAT_TEMPLATE, ())


def test_learning_from_references_lowers_the_loss_and_resumes(
    tiny_folder: Path, tmp_path: Path, fresh_cache: Path
) -> None:
    how: dict[str, Any] = {"method": {"name": "lora", "rank": 4}, "optim": {"lr": 0.02}}
    learn = {"algorithm": "sft", "keep": "last"}
    whole = start(tiny_folder, tmp_path / "a", EchoTask(), train={"steps": 12, **learn}, **how)
    losses = [row["loss"] for row in metrics_of(whole.run) if row["step"]]
    assert losses[-1] < 0.9 * losses[0]
    half = start(tiny_folder, tmp_path / "b", EchoTask(), train={"steps": 5, **learn}, **how)
    assert torch.equal(resume(half.run, ["train.steps=12"], task=EchoTask(), say=quiet).v, whole.v)


def test_references_that_the_scorer_calls_wrong_are_refused(
    tiny_folder: Path, tmp_path: Path, fresh_cache: Path
) -> None:
    with pytest.raises(UserError, match="none of the first 8 reference replies is right .* set sft.target"):
        start(tiny_folder, tmp_path, EchoTask(), train={"algorithm": "sft"}, sft={"target": "it is {answer}"})
    assert not list(tmp_path.glob("*/config.toml"))


def test_an_item_that_lacks_what_the_target_names_is_found_before_training(
    tiny_folder: Path, tmp_path: Path, fresh_cache: Path
) -> None:
    class Lacking(EchoTask):
        def items(self, split: Split) -> Sequence[Item]:
            return [replace(item, metadata={}) if i == 7 else item for i, item in enumerate(super().items(split))]

    with pytest.raises(UserError, match=r"sft\.target asks for \{solution\}, and the question 'tr7' has none"):
        start(tiny_folder, tmp_path, Lacking(), train={"algorithm": "sft"}, sft={"target": "{solution} {answer}"})
    assert not list(tmp_path.glob("*/config.toml"))


def test_controls_are_rewards_and_need_grpo(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match=r"train\.control must be none unless train\.algorithm is grpo"):
        tiny_config(tiny_folder, train={"algorithm": "sft", "control": "format"})


def _group(texts: Sequence[tuple[str, float, bool]]) -> Group:
    replies = [
        Reply(item_id="i", question="q", answer="a", text=text, strict=strict, value_only=strict, stopped=stopped,
              num_tokens=len(text), scores={}, answered=True, token_ids=tuple(text.encode()))
        for text, strict, stopped in texts
    ]  # fmt: skip
    return Group(Item("i", "q", "a"), (1, 2), replies, [one[1] for one in texts])


def test_rft_learns_each_right_and_finished_reply_once() -> None:
    rows = right_rows([_group([("yes", 1.0, True), ("no", 0.0, True), ("yes", 1.0, True), ("cut", 1.0, False)]),
                       _group([("b", 1.0, True), ("c", 1.0, True)])])  # fmt: skip
    assert [bytes(row.token_ids) for row in rows] == [b"yes", b"b", b"c"]
    assert [row.group for row in rows] == [0, 1, 1]


def test_rft_samples_from_the_untrained_model(
    tiny_folder: Path, tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinylora.training import rft as module

    seen = []
    real = module.sample_step
    monkeypatch.setattr(module, "sample_step", lambda b, o, v, **more: seen.append(v) or real(b, o, v, **more))
    done = start(tiny_folder, tmp_path, ByteTask(), train={"algorithm": "rft", "steps": 3}, grpo={"refill_factor": 3.0})
    assert seen == [None] * 3
    rows = [row for row in metrics_of(done.run) if row["step"]]
    assert all(row["replies_trained"] <= 4 and row["tokens_sampled"] > 0 for row in rows)
    assert all(row["prompts_sampled"] == 2 for row in rows)  # a group of equal rewards is no loss here: no refill
    assert all(("loss" in row) == (row["replies_trained"] > 0) for row in rows)


def test_without_a_right_reply_nothing_moves(tiny_folder: Path, tmp_path: Path, fresh_cache: Path) -> None:
    class Never(ByteTask):
        def score(self, item: Item, text: str) -> dict[str, float]:
            return {"strict": 0.0, "value_only": 0.0}

    said: list[str] = []
    from tinylora.training.train import train

    done = train(
        tiny_config(tiny_folder, train={"algorithm": "rft", "steps": 6}), Never(), out=tmp_path, say=said.append
    )
    assert not done.v.any()
    assert any("not one sampled reply was right" in text for text in said)
