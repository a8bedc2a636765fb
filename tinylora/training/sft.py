"""SFT on v: supervised learning on reference solutions, whole replies with their stop token."""

from typing import Any

from tinylora.errors import UserError
from tinylora.learner.learner import Row
from tinylora.models.control import found_in
from tinylora.rollouts.order import DataOrder
from tinylora.rollouts.runtime import Runtime
from tinylora.talk import Say
from tinylora.tasks.base import shorten
from tinylora.tasks.reference import reference_reply
from tinylora.training.algorithm import GradientAlgorithm
from tinylora.training.supervised import supervised_step

LOOKED_AT = 64
"""Reference replies that are scored before a run."""


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
    if tokens := list(dict.fromkeys(token for reply in every for token in found_in(runtime.base, reply))):
        say(
            f"reference replies hold {', '.join(tokens)}, control tokens of {runtime.base.name}, which are learned as "
            "such; the token that ends a reply is put behind it in any case"
        )
    longest = max(map(len, runtime.references(task.items("train"))))
    if longest > config.generation.max_new_tokens:
        say(
            f"a reference reply has {longest} tokens, and replies are cut off at generation.max_new_tokens = "
            f"{config.generation.max_new_tokens}"
        )


def reference_rows(runtime: Runtime, order: DataOrder) -> list[Row]:
    """The next prompts_per_step x group_size items with their reference replies: as many replies as a GRPO step has."""
    task, config = runtime.task, runtime.config
    items = [item for _, item in order.take(config.grpo.prompts_per_step * config.grpo.group_size)]
    replies = runtime.references(items)
    return [Row(i, runtime.encode(task.prompt(item)), replies[i]) for i, item in enumerate(items)]
