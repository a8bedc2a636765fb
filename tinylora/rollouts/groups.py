"""One step's rollouts: draw prompts in a seeded order, complete each G times, score, refill groups without variance."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.rollouts.order import DataOrder
from tinylora.rollouts.replies import Reply
from tinylora.rollouts.runtime import Runtime
from tinylora.tasks.base import Item


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt's G replies and their rewards.

    >>> Group(item, prompt_ids=(1, 40, 41), replies=[right, wrong], rewards=[1.0, 0.0]).has_variance
    True
    """

    item: Item
    prompt_ids: tuple[int, ...]
    replies: list[Reply]
    rewards: list[float]

    @property
    def has_variance(self) -> bool:
        """Whether the rewards differ, so that the group carries a gradient."""
        return max(self.rewards) > min(self.rewards)


@dataclass
class Rollouts:
    """A step's batch (`groups`) and everything that was sampled to get it (`sampled`, the batch included)."""

    groups: list[Group]
    sampled: list[Group] = field(repr=False)
    seconds: float

    @property
    def tokens_sampled(self) -> int:
        """Completion tokens sampled, discarded groups included."""
        return sum(len(reply.token_ids) for group in self.sampled for reply in group.replies)


def reward(result: Reply, config: RunConfig) -> float:
    """Weighted sum of the task's scores; `strict` is 0 for a truncated completion, and truncated = "zero" makes it 0.

    Under train.control = "format" it is whether the reply has stopped and has the asked-for format, nothing else.

    Raises: UserError, with the item, for a score the task does not give or a reward that is not finite.
    """
    if not result.stopped and config.grpo.truncated == "zero":
        return 0.0
    if config.train.control == "format":
        return float(result.answered and result.stopped)
    scores = {**result.scores, "strict": result.strict}
    total = 0.0
    for name, weight in config.reward.items():
        if name not in scores:
            raise UserError(f"reward.{name} is no score of this task; it gives: {', '.join(sorted(scores))}")
        total += weight * scores[name]
    if not math.isfinite(total):
        raise UserError(f"the reward is {total} for item {result.item_id[:12]} ({result.question!r}): {result.text!r}")
    return total


def shuffled(rewards: Sequence[float], seed: int, position: int) -> list[float]:
    """One prompt's rewards in an order that has nothing to do with its completions; the same on every machine.

    Their spread stays, and with it the size of the gradient: what is gone is only what they say.
    """
    order = np.random.default_rng([seed, position, 0x5EED]).permutation(len(rewards))
    return [rewards[int(i)] for i in order]


def sample_step(runtime: Runtime, order: DataOrder, v: Tensor | None, *, refill: bool = True) -> Rollouts:
    """Sample one step's groups under v; None is the untrained model. Without refill, prompts_per_step and no more.

    Groups whose rewards are all equal carry no gradient; they are replaced by new prompts until refill_factor times
    prompts_per_step prompts were sampled. What is missing then is filled up with such groups, which count in the step's
    denominators. The draws are keyed by (train.seed, position in the data order, sample).
    """
    config = runtime.config
    params = runtime.sampling(config.generation.temperature, config.train.seed)
    wanted = config.grpo.prompts_per_step
    most = max(wanted, int(config.grpo.refill_factor * wanted)) if refill else wanted
    sampled: list[Group] = []
    started = time.perf_counter()
    while True:
        useful = sum(group.has_variance for group in sampled)
        count = min(wanted - useful, most - len(sampled))
        if count <= 0:
            break
        taken = order.take(count)
        requests = [
            runtime.request(item, v, params, key=position, num_samples=config.grpo.group_size)
            for position, item in taken
        ]
        replies: list[list[Reply]] = [[] for _ in taken]
        for completion in runtime.engine.generate(requests):
            index = completion.request_index
            replies[index].append(runtime.score(taken[index][1], requests[index], completion))
        for (position, item), request, own in zip(taken, requests, replies, strict=True):
            rewards = [reward(reply, config) for reply in own]
            if config.train.control == "shuffled":
                rewards = shuffled(rewards, config.train.seed, position)
            sampled.append(Group(item, request.prompt_ids, own, rewards))
    with_variance = [group for group in sampled if group.has_variance]
    without = [group for group in sampled if not group.has_variance]
    return Rollouts([*with_variance, *without][:wanted], sampled, time.perf_counter() - started)
