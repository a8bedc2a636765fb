"""Supervised steps on the same numbers: sft on reference solutions, rft on the base model's own right answers.

Both minimise the mean negative log-probability of the tokens of whole replies, stop token included, at temperature 1.
rft (rejection sampling fine-tuning, Yuan et al. 2023, arXiv:2308.01825) samples from the untrained model, keeps the
distinct replies that are right and finished, and learns from them; where the paper samples everything before training,
each step here samples its own prompts, from the same untrained model, and distinct means within a prompt's group.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.learner.learner import Learner, Row, micro_batches
from tinylora.learner.memory import FALLBACK_MICRO_BATCH_TOKENS
from tinylora.models.load import encode_prompt
from tinylora.models.prompt import end_of_reply
from tinylora.rollouts.groups import Group
from tinylora.rollouts.order import DataOrder
from tinylora.rollouts.runtime import Workbench
from tinylora.talk import Say
from tinylora.tasks.base import Item, Task, shorten
from tinylora.training.grpo import learning_rate

LOOKED_AT = 64
"""Reference replies that are scored before a run."""
PLACE = re.compile(r"(\\[A-Za-z]+(?:\{[^{}]*\})*)?\{([A-Za-z_]\w*)\}")
"""A name in braces, and the LaTeX command in front of it, if there is one."""


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


def check_references(bench: Workbench, say: Say) -> None:
    """Write every reference reply, and score the first ones as if the model had given them.

    Raises: UserError if an item lacks what sft.target names, no reply is right (the model would learn to be wrong), or
    the model has no token that ends one.
    Says so where some are.
    """
    task, config = bench.task, bench.config
    assert task is not None
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
    end = end_of_reply(bench.base, config.prompt.chat)
    longest = max(len(_tokens(bench, reply, end)) for reply in replies)
    if longest > config.generation.max_new_tokens:
        say(
            f"a reference reply has {longest} tokens, and replies are cut off at generation.max_new_tokens = "
            f"{config.generation.max_new_tokens}"
        )


def _tokens(bench: Workbench, reply: str, end: int) -> tuple[int, ...]:
    return (*bench.base.tokenizer.encode(reply, add_special_tokens=False), end)


def reference_rows(bench: Workbench, order: DataOrder) -> list[Row]:
    """The next prompts_per_step x group_size items with their reference replies: as many replies as a GRPO step has.

    A reply ends with the token that ends a turn (see `end_of_reply`).
    """
    task, config = bench.task, bench.config
    assert task is not None
    count = config.grpo.prompts_per_step * config.grpo.group_size
    end = end_of_reply(bench.base, config.prompt.chat)
    return [
        Row(
            index,
            encode_prompt(bench.base, task.prompt(item), config.prompt.chat),
            _tokens(bench, reference_reply(task, item, config.sft.target), end),
        )
        for index, (_, item) in enumerate(order.take(count))
    ]


def right_rows(groups: Sequence[Group]) -> list[Row]:
    """The distinct right and finished replies of each prompt."""
    rows = []
    for index, group in enumerate(groups):
        seen: set[tuple[int, ...]] = set()
        for completion, result in zip(group.completions, group.results, strict=True):
            if result.strict >= 1 and result.stopped and completion.token_ids not in seen:
                seen.add(completion.token_ids)
                rows.append(Row(index, group.prompt_ids, completion.token_ids))
    return rows


@dataclass(frozen=True, slots=True)
class SupervisedStep:
    """What a step was made of."""

    loss: float
    """Mean over tokens; NaN without a reply."""
    grad_norm: float
    replies: int
    tokens: int

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl."""
        counts = {"tokens_trained": float(self.tokens), "tokens_computed": float(self.tokens)}
        loss = {} if math.isnan(self.loss) else {"loss": self.loss}
        return {**loss, "grad_norm": self.grad_norm, "replies_trained": float(self.replies), **counts}


def supervised_step(
    learner: Learner, rows: Sequence[Row], v: Tensor, optimizer: torch.optim.Optimizer, config: RunConfig, step: int
) -> SupervisedStep:
    """Update v in place once on the mean loss of all tokens; without a row nothing moves.

    Raises: UserError if the loss or the gradient is not finite; v is then as it was.
    """
    total = sum(len(row.token_ids) for row in rows)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.zero_grad(set_to_none=True)
    loss_sum = 0.0
    size = config.train.micro_batch_tokens or FALLBACK_MICRO_BATCH_TOKENS
    for batch in micro_batches(rows, size, shared_prompts=learner.shared_prompts, padded=learner.padded):
        logprobs, mask = learner.logprobs([rows[i] for i in batch], v)
        loss = -logprobs[mask].sum() / total
        if not torch.isfinite(loss):
            raise UserError(
                f"step {step + 1}: the loss is {float(loss.detach())}; v is kept as it was. "
                "Try a smaller optim.lr, or model.dtype = float32"
            )
        loss.backward()
        loss_sum += float(loss.detach())
    if v.grad is None:
        return SupervisedStep(math.nan, 0.0, 0, 0)
    norm = float(v.grad.norm())
    if not math.isfinite(norm):
        raise UserError(f"step {step + 1}: the gradient is not finite; v is kept as it was. Try model.dtype = float32")
    if config.optim.max_grad_norm and norm > config.optim.max_grad_norm:
        v.grad.mul_(config.optim.max_grad_norm / norm)
    optimizer.step()
    return SupervisedStep(loss_sum, norm, len(rows), total)
