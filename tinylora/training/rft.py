"""RFT on v: supervised learning on the untrained model's own right replies.

Rejection sampling fine-tuning (Yuan et al. 2023, arXiv:2308.01825) samples from the untrained model, keeps the distinct
replies that are right and finished, and learns from them. Where the paper samples everything before training, each step
here samples its own prompts, from the same untrained model, and distinct means within a prompt's group.
"""

from collections.abc import Sequence
from typing import Any

from tinylora.learner.learner import Row
from tinylora.rollouts.groups import Group, Rollouts, sample_step
from tinylora.rollouts.order import DataOrder
from tinylora.training.algorithm import GradientAlgorithm, rollout_metrics
from tinylora.training.supervised import supervised_step


class Rft(GradientAlgorithm):
    """Maximum likelihood of the untrained model's right replies, at temperature 1."""

    def step(self, order: DataOrder, step: int) -> tuple[dict[str, Any], Rollouts]:
        """Sample from the untrained model, then update v on what is right. Raises: UserError as `supervised_step`."""
        rollouts = sample_step(self.runtime, order, None, refill=False)
        metrics = rollout_metrics(rollouts)
        rows = right_rows(rollouts.sampled)
        metrics |= supervised_step(self.learner, rows, self.v, self.optimizer, self.runtime.config, step).metrics()
        return metrics, rollouts


def right_rows(groups: Sequence[Group]) -> list[Row]:
    """The distinct right and finished replies of each prompt."""
    rows = []
    for index, group in enumerate(groups):
        seen: set[tuple[int, ...]] = set()
        for reply in group.replies:
            if reply.strict >= 1 and reply.stopped and reply.token_ids not in seen:
                seen.add(reply.token_ids)
                rows.append(Row(index, group.prompt_ids, reply.token_ids))
    return rows
