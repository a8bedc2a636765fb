"""What the training loop needs of an algorithm, and what those that follow a gradient share.

A new one is a file beside grpo.py with a class of this kind, its line in `ALGORITHMS` of train.py, and its facts in
`tinylora.config.algorithms`.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from tinylora.learner.learner import Learner
from tinylora.rollouts.groups import Rollouts
from tinylora.rollouts.order import DataOrder
from tinylora.rollouts.runtime import Runtime
from tinylora.talk import Say
from tinylora.training.metrics import Means
from tinylora.training.update import adam_state, make_optimizer, restore_adam


class Algorithm(ABC):
    """How v learns from one batch of the data. One is made for a run."""

    def __init__(self, runtime: Runtime, learner: Learner, v: Tensor) -> None:
        """v (groups, u), which `step` moves in place."""
        self.runtime, self.learner, self.v = runtime, learner, v

    @staticmethod  # noqa: B027 (most have nothing to look at)
    def check(runtime: Runtime, say: Say) -> None:
        """Before a run begins. Raises: UserError for what cannot work."""

    @staticmethod
    def learner_temperature(runtime: Runtime) -> float:
        """Of the log-probs that the learner computes; 1 is the model's own distribution."""
        return 1.0

    @abstractmethod
    def step(self, order: DataOrder, step: int) -> tuple[dict[str, Any], Rollouts | None]:
        """Move v by one step (counted from 0). Returns metrics, and what was sampled.

        Raises: UserError for a loss or gradient that is not finite; v is then as it was.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What it keeps between steps, for a checkpoint: tensors on the CPU, or what JSON holds."""

    @abstractmethod
    def restore(self, saved: dict[str, Any]) -> None:
        """Put back what `state` gave."""


class GradientAlgorithm(Algorithm):
    """Adam on v, a leaf that requires a gradient, and an algorithm's own `step`."""

    def __init__(self, runtime: Runtime, learner: Learner, v: Tensor) -> None:
        """As all of them, with Adam at rest."""
        super().__init__(runtime, learner, v)
        self.optimizer = make_optimizer(v, runtime.config)

    def state(self) -> dict[str, Any]:
        """Adam's moments."""
        return adam_state(self.v, self.optimizer)

    def restore(self, saved: dict[str, Any]) -> None:
        """Put them back."""
        restore_adam(self.v, self.optimizer, saved)


def rollout_metrics(rollouts: Rollouts) -> dict[str, Any]:
    """Means over everything that was sampled, and its counts, tokens and seconds."""
    means = Means()
    for group in rollouts.sampled:
        for reply, value in zip(group.replies, group.rewards, strict=True):
            means.add("reward", value)
            means.add("strict", reply.strict)
            means.add("value_only", reply.value_only)
            means.add("answered", float(reply.answered))
            means.add("truncated", float(not reply.stopped))
            means.add("length", reply.num_tokens)
        means.add("zero_variance_groups", float(not group.has_variance))
    return {
        **means.result(),
        "prompts_sampled": len(rollouts.sampled),
        "tokens_sampled": rollouts.tokens_sampled,
        "prompt_tokens": sum(len(group.prompt_ids) for group in rollouts.sampled),
        "rollout_seconds": rollouts.seconds,
        "tokens_per_second": rollouts.tokens_sampled / rollouts.seconds,
    }
