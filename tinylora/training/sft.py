"""SFT on v: supervised learning on reference solutions, whole replies with their stop token."""

import re
from typing import Any

from tinylora.errors import UserError
from tinylora.learner.learner import Row
from tinylora.models.prompt import end_of_reply
from tinylora.models.template import Handed
from tinylora.rollouts.order import DataOrder
from tinylora.rollouts.runtime import Runtime
from tinylora.talk import Say
from tinylora.tasks.base import Item, Task, shorten
from tinylora.training.algorithm import GradientAlgorithm
from tinylora.training.supervised import supervised_step

LOOKED_AT = 64
"""Reference replies that are scored before a run."""
PLACE = re.compile(r"(\\[A-Za-z]+(?:\{[^{}]*\})*)?\{([A-Za-z_]\w*)\}")
"""A name in braces, and the LaTeX command in front of it, if there is one."""


class Sft(GradientAlgorithm):
    """Maximum likelihood of reference replies, at temperature 1."""

    @staticmethod
    def check(runtime: Runtime, say: Say) -> None:
        """Raises: UserError as `check_references` does."""
        check_references(runtime, say)

    def step(self, order: DataOrder, step: int) -> tuple[dict[str, Any], None]:
        """Update v on the next reference replies. Raises: UserError as `supervised_step` does."""
        rows = reference_rows(self.runtime, order)
        metrics: dict[str, Any] = {"prompts_sampled": len(rows), "completions_per_prompt": 1, "tokens_sampled": 0}
        metrics["prompt_tokens"] = sum(len(row.prompt_ids) for row in rows)
        metrics |= supervised_step(self.learner, rows, self.v, self.optimizer, self.runtime.config, step).metrics()
        return metrics, None


def reference_reply(task: Task, item: Item, template: str) -> str:
    """The reply that sft learns: `template` with {question} (the user's last turn), {answer} and {NAME} of what the
    item brings beside them, such as {solution}.

    The argument of a LaTeX command, as in \\mathrm{cm}, is no name; \\boxed{{answer}} is one in an argument.
    Raises: UserError for a name that the item does not have.
    """
    plain = {key: str(value) for key, value in item.metadata.items() if isinstance(value, (str, int, float))}
    known = {**plain, "answer": item.answer, "question": task.prompt(item)[-1]["content"]}

    def value(match: re.Match[str]) -> str:
        command, name = match.groups()
        if name not in known:
            if command:
                return match[0]
            raise UserError(
                f"sft.target asks for {{{name}}}, and the question {shorten(item.question, 80)} has none; it has "
                f"{', '.join(sorted(known))}"
            )
        return (command or "") + known[name]

    return PLACE.sub(value, template)


def check_references(runtime: Runtime, say: Say) -> None:
    """Write every reference reply, and score the first ones as if the model had given them.

    Raises: UserError if an item lacks what sft.target names, no reply is right (the model would learn to be wrong), or
    the model has no token that ends one.
    Says so where some are.
    """
    task, config = runtime.task, runtime.config
    every = [reference_reply(task, item, config.sft.target) for item in task.items("train")]  # none lacks a name
    items, replies = task.items("train")[:LOOKED_AT], every[:LOOKED_AT]
    right = sum(task.score(item, reply).get("strict", 0.0) >= 1 for item, reply in zip(items, replies, strict=True))
    if not right:
        raise UserError(
            f"none of the first {len(items)} reference replies is right by the task's own scorer, such as "
            f"{shorten(replies[0], 120)} where {shorten(items[0].answer, 60)} is the answer; set sft.target to what a "
            "right reply looks like"
        )
    if right < len(items):
        say(f"only {right} of the first {len(items)} reference replies are right by the task's own scorer")
    end = end_of_reply(runtime.base, config.prompt.chat, Handed.of(config.prompt))
    longest = max(len(_tokens(runtime, reply, end)) for reply in replies)
    if longest > config.generation.max_new_tokens:
        say(
            f"a reference reply has {longest} tokens, and replies are cut off at generation.max_new_tokens = "
            f"{config.generation.max_new_tokens}"
        )


def _tokens(runtime: Runtime, reply: str, end: int) -> tuple[int, ...]:
    return (*runtime.base.tokenizer.encode(reply, add_special_tokens=False), end)


def reference_rows(runtime: Runtime, order: DataOrder) -> list[Row]:
    """The next prompts_per_step x group_size items with their reference replies: as many replies as a GRPO step has.

    A reply ends with the token that ends a turn (see `end_of_reply`).
    """
    task, config = runtime.task, runtime.config
    count = config.grpo.prompts_per_step * config.grpo.group_size
    end = end_of_reply(runtime.base, config.prompt.chat, Handed.of(config.prompt))
    return [
        Row(
            index,
            runtime.encode(task.prompt(item)),
            _tokens(runtime, reference_reply(task, item, config.sft.target), end),
        )
        for index, (_, item) in enumerate(order.take(count))
    ]
