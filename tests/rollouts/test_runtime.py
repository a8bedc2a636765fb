"""Items to results: what a cut-off completion counts, how failing scorers are shown, and the order of things."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import ByteTask, quiet, tiny_config

from tinylora.generation.types import Completion
from tinylora.rollouts.replies import correct, draw_key, mean, score_completion, stop_at
from tinylora.rollouts.runtime import Runtime, open_runtime
from tinylora.serving.chat import _reply
from tinylora.tasks.base import Item, Message, ScorerError


@pytest.fixture
def runtime(tiny_folder: Path, fresh_cache: Path) -> Runtime:
    return open_runtime(tiny_config(tiny_folder), task=ByteTask(), say=quiet)


class FixedTask(ByteTask):
    """Gives the scores it was told, or raises."""

    def __init__(self, scores: dict[str, float] | Exception) -> None:
        super().__init__()
        self.scores = scores

    def score(self, item: Item, text: str) -> dict[str, float]:
        if isinstance(self.scores, Exception):
            raise self.scores
        return self.scores


def completion(reason: Any, text: str = "abc") -> Completion:
    ids = tuple(range(70, 70 + len(text)))
    logprobs = (-1.0,) * len(ids)
    return Completion(
        request_index=0,
        sample_index=0,
        token_ids=ids,
        finish_reason=reason,
        logprobs=logprobs,
        sampling_logprobs=logprobs,
    )


def test_strict_is_0_for_a_completion_that_was_cut_off_and_value_only_is_kept(runtime: Runtime) -> None:
    task = FixedTask({"strict": 1.0, "value_only": 1.0, "style": 0.25})
    item = task.items("test")[0]
    stopped = score_completion(runtime.base, task, item, completion("stop"))
    cut = score_completion(runtime.base, task, item, completion("length"))
    assert (stopped.strict, stopped.value_only, stopped.stopped) == (1.0, 1.0, True)
    assert (cut.strict, cut.value_only, cut.stopped) == (0.0, 1.0, False)
    assert cut.scores == {"strict": 1.0, "value_only": 1.0, "style": 0.25}  # as the task gave them
    assert correct([stopped, cut]).tolist() == [True, False]
    assert correct([stopped, cut], "value_only").tolist() == [True, True]
    assert mean([stopped, cut], "stopped") == 0.5
    assert mean([stopped, cut], "num_tokens") == 3


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (ZeroDivisionError("by zero"), r"the scorer raised ZeroDivisionError: by zero"),
        ({"strict": float("nan"), "value_only": 0.0}, r"scores must be finite, got \{'strict': nan\}"),
        ({"strict": 1.0}, "no score value_only was given"),
    ],
)
def test_a_failing_scorer_shows_the_item(runtime: Runtime, scores: Any, message: str) -> None:
    task = FixedTask(scores)
    item = task.items("test")[1]
    with pytest.raises(ScorerError, match=rf"{message} \(item {item.id[:12]}, question 'qte1', answer 'even', reply "):
        score_completion(runtime.base, task, item, completion("stop"))


def test_results_come_in_the_order_of_items_and_do_not_depend_on_the_batch(runtime: Runtime) -> None:
    items = runtime.task.items("test")
    v = 0.3 * torch.ones_like(runtime.adapter.zeros())
    options: dict[str, Any] = {"v": v, "temperature": 1.0, "seed": 3, "num_samples": 2}
    seen: list[tuple[int, int]] = []
    runtime.engine.max_batch_rows = 1  # 2 items at a time
    found = runtime.answer(items, on_progress=lambda *n: seen.append(n), **options)
    assert [result.item_id for result in found] == [item.id for item in items for _ in range(2)]
    assert seen == [(2, 5), (4, 5), (5, 5)]
    runtime.engine.max_batch_rows = 128
    again = runtime.answer(items[::-1], **options)
    by_item = {id: [r.text for r in found if r.item_id == id] for id in (item.id for item in items)}
    assert all(by_item[r.item_id].count(r.text) for r in again)
    assert len({result.text for result in found}) > 5
    other = runtime.answer(items, **{**options, "seed": 4})
    assert [r.text for r in other] != [r.text for r in found]


def test_another_prompt_replaces_the_tasks_own(runtime: Runtime) -> None:
    items = runtime.task.items("test")
    asked: list[str] = []

    def prompt(item: Item) -> list[Message]:
        asked.append(item.question)
        return [{"role": "user", "content": f"please {item.question}"}]

    own = runtime.answer(items, None, max_new_tokens=16, temperature=1.0)
    other = runtime.answer(items, None, max_new_tokens=16, temperature=1.0, prompt=prompt)
    assert asked == [item.question for item in items]
    assert [r.text for r in own] != [r.text for r in other]


def test_any_item_id_names_its_draws() -> None:
    hashed = Item(id="00000000000000ffdeadbeef", question="q", answer="a")
    named = [Item(id=name, question="q", answer="a") for name in ("item-1", "item-2")]
    assert draw_key(hashed) == 0xF  # the first 15 hex digits: what recorded runs were drawn with
    assert len({draw_key(item) for item in named}) == 2 and all(0 <= draw_key(item) < 2**60 for item in named)


def test_no_space_is_taken_out_of_what_the_model_wrote(runtime: Runtime) -> None:
    """Llama 3's tokenizer asks for it (`a , b` to `a, b`, `x != 1` to `x!= 1`), and transformers 5.0 does it."""
    tokenizer: Any = runtime.base.tokenizer
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    written = "'a , b' if x != 1 else 3 . 5 ? do n't"
    ids = tuple(tokenizer(written, add_special_tokens=False).input_ids)
    assert tokenizer.decode(list(ids)) != written  # what it would be
    done = Completion(
        request_index=0, sample_index=0, token_ids=ids, finish_reason="stop", logprobs=(0.0,) * len(ids),
        sampling_logprobs=(0.0,) * len(ids),
    )  # fmt: skip
    task = FixedTask({"strict": 1.0, "value_only": 1.0})
    assert score_completion(runtime.base, task, task.items("test")[0], done).text == written
    assert _reply(runtime, done).text == written
    should_stop = stop_at(runtime.base, [" , b"])
    assert should_stop is not None and should_stop(list(ids[:6]))
