"""Data order, refill, rewards: what a step samples and what it makes of it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_run import ByteTask, quiet, tiny_config

from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.generation.types import Completion, Request
from tinylora.rollouts.groups import Rollouts, reward, sample_step
from tinylora.rollouts.order import DataOrder
from tinylora.rollouts.replies import Reply
from tinylora.rollouts.runtime import Runtime, open_runtime
from tinylora.tasks.base import Item, ScorerError, Task

ITEMS = ByteTask(size=7).items("train")


def test_the_order_goes_through_every_item_each_epoch_anew() -> None:
    taken = DataOrder(ITEMS, seed=1).take(21)
    assert [position for position, _ in taken] == list(range(21))
    epochs = [[item.id for _, item in taken[i : i + 7]] for i in (0, 7, 14)]
    assert all(sorted(epoch) == sorted(item.id for item in ITEMS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [item.id for _, item in DataOrder(ITEMS, seed=2).take(7)] != epochs[0]


@pytest.mark.parametrize("position", [0, 3, 7, 12])
def test_the_order_resumes_at_any_position(position: int) -> None:
    whole = DataOrder(ITEMS, seed=1).take(20)
    resumed = DataOrder(ITEMS, seed=1, position=position)
    assert [*resumed.take(2), *resumed.take(5)] == whole[position : position + 7]
    assert resumed.position == position + 7
    moved = DataOrder(ITEMS, seed=1)
    moved.take(9)
    moved.position = position  # as a checkpoint sets it
    assert moved.take(4) == whole[position : position + 4]


# --- rewards ---


def result(stopped: bool = True, **scores: float) -> Reply:
    scores = {"strict": 1.0, "value_only": 0.5} | scores
    strict = scores["strict"] if stopped else 0.0
    return Reply("0123456789abcdef", "1+1?", "2", "two", strict, scores["value_only"], stopped, 3, scores)


def config(weights: dict[str, float], truncated: str = "zero") -> RunConfig:
    return replace(tiny_config("x", grpo={"truncated": truncated}), reward=weights)


def test_the_reward_is_the_weighted_sum_of_scores() -> None:
    weights = {"strict": 2.0, "value_only": -0.5, "format": 0.25}
    assert reward(result(format=0.5), config(weights)) == 2.0 * 1 - 0.5 * 0.5 + 0.25 * 0.5
    assert reward(result(), config({"strict": 1.0})) == 1.0


@pytest.mark.parametrize(("truncated", "expected"), [("zero", 0.0), ("keep", 0.5), ("mask", 0.5)])
def test_a_cut_off_completion_gets_no_strict_reward(truncated: str, expected: float) -> None:
    assert reward(result(stopped=False), config({"strict": 1.0, "value_only": 1.0}, truncated)) == expected


def test_a_score_that_the_task_does_not_give_is_named() -> None:
    with pytest.raises(UserError, match=r"reward\.styl is no score of this task; it gives: strict, value_only"):
        reward(result(), config({"styl": 1.0}))


def test_a_reward_that_is_not_finite_shows_the_item() -> None:
    with pytest.raises(UserError, match=r"the reward is nan for item 0123456789ab \('1\+1\?'\): 'two'"):
        reward(result(extra=float("nan")), config({"extra": 1.0}))
    with pytest.raises(UserError, match="the reward is inf"):
        reward(result(extra=1e308), config({"extra": 1e308}))


# --- sampling a step ---


class Script:
    """An engine that answers every request with scripted texts, and keeps what it was asked."""

    max_batch_rows = 8

    def __init__(self, answers: Sequence[str], base: Any) -> None:
        self.answers = answers
        self.base = base
        self.asked: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        found = []
        for index, request in enumerate(requests):
            texts = self.answers[len(self.asked) % len(self.answers)].split("|")
            self.asked.append(request)
            for sample, text in enumerate(texts[: request.num_samples]):
                ids = (*self.base.tokenizer.encode(text), self.base.stop_token_ids[0])
                zeros = (0.0,) * len(ids)
                found.append(
                    Completion(
                        request_index=index,
                        sample_index=sample,
                        token_ids=ids,
                        finish_reason="stop",
                        logprobs=zeros,
                        sampling_logprobs=zeros,
                    )
                )
        return found


class Right(ByteTask):
    def score(self, item: Item, text: str) -> dict[str, float]:
        if text == "!":
            raise RuntimeError("cannot score this")
        return {"strict": float(text == "yes"), "value_only": float(text == "yes")}


@pytest.fixture
def runtime(tiny_folder: Path, fresh_cache: Path) -> Runtime:
    config = tiny_config(tiny_folder, grpo={"prompts_per_step": 3, "truncated": "zero", "refill_factor": 2.5})
    return open_runtime(config, task=Right(), say=quiet)


def step(runtime: Runtime, answers: Sequence[str]) -> tuple[Rollouts, DataOrder, Script]:
    task: Task | None = runtime.task
    assert task is not None
    order = DataOrder(task.items("train"), 0)
    runtime.engine = Script(answers, runtime.base)  # type: ignore[assignment]
    return sample_step(runtime, order, runtime.adapter.zeros()), order, runtime.engine  # type: ignore[return-value]


def test_a_step_without_equal_rewards_samples_no_more_than_it_needs(runtime: Runtime) -> None:
    rollouts, order, engine = step(runtime, ["yes|no"])
    assert len(rollouts.groups) == len(rollouts.sampled) == order.position == 3
    assert [request.key for request in engine.asked] == [0, 1, 2]
    assert all(request.num_samples == 2 for request in engine.asked)
    assert all(group.rewards == [1.0, 0.0] for group in rollouts.groups)


def test_groups_of_equal_rewards_are_replaced(runtime: Runtime) -> None:
    rollouts, order, _ = step(runtime, ["yes|no", "no|no", "yes|yes", "no|no", "no|yes", "yes|no"])
    assert [group.has_variance for group in rollouts.sampled] == [True, False, False, False, True, True]
    assert [group.has_variance for group in rollouts.groups] == [True, True, True]
    assert order.position == 6
    # every token that was sampled counts: "yes" is 3 and "no" 2 byte tokens, and each ends with a stop token
    assert rollouts.tokens_sampled == 7 + 6 + 8 + 6 + 7 + 7
    assert len({group.item.id for group in rollouts.sampled[:5]}) == 5


def test_refill_ends_at_its_cap_and_fills_up_with_what_there_is(runtime: Runtime) -> None:
    rollouts, order, _ = step(runtime, ["no|no", "no|no", "no|no", "no|no", "yes|no", "no|no", "yes|yes"])
    assert len(rollouts.sampled) == order.position == 7  # floor(2.5 x 3)
    assert [group.has_variance for group in rollouts.groups] == [True, False, False]
    assert rollouts.groups[0] is rollouts.sampled[4]


def test_the_cap_of_1_samples_once(runtime: Runtime) -> None:
    runtime.config = replace(runtime.config, grpo=replace(runtime.config.grpo, refill_factor=1.0))
    rollouts, order, _ = step(runtime, ["no|no"])
    assert len(rollouts.groups) == len(rollouts.sampled) == order.position == 3
    assert not any(group.has_variance for group in rollouts.groups)


def test_a_scorer_that_raises_stops_the_step_with_the_item(runtime: Runtime) -> None:
    message = r"RuntimeError: cannot score this .*question 'qtr\d', answer 'even', reply '!'"
    with pytest.raises(ScorerError, match=message):
        step(runtime, ["yes|no", "no|!"])
