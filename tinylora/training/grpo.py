"""GRPO on v: from rollouts to advantages, micro-batches, gradient, Adam."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.learner.learner import Learner, Row, micro_batches
from tinylora.learner.memory import FALLBACK_MICRO_BATCH_TOKENS
from tinylora.rollouts.groups import Group, Rollouts, sample_step
from tinylora.rollouts.order import DataOrder
from tinylora.rollouts.runtime import Runtime
from tinylora.training.advantages import group_advantages
from tinylora.training.algorithm import GradientAlgorithm, rollout_metrics
from tinylora.training.metrics import Means
from tinylora.training.objective import policy_loss
from tinylora.training.update import descend


class Grpo(GradientAlgorithm):
    """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300) with truncated importance sampling."""

    @staticmethod
    def learner_temperature(runtime: Runtime) -> float:
        """That of the rollouts: the policy is what is sampled from."""
        return runtime.config.generation.temperature

    def step(self, order: DataOrder, step: int) -> tuple[dict[str, Any], Rollouts]:
        """Sample groups under v, then update v on them. Raises: UserError as `grpo_step` does."""
        rollouts = sample_step(self.runtime, order, self.v.detach().clone())
        metrics = rollout_metrics(rollouts)
        metrics |= grpo_step(self.learner, rollouts.groups, self.v, self.optimizer, self.runtime.config, step)
        return metrics, rollouts


@dataclass(frozen=True, slots=True)
class _Sample:
    row: Row
    advantage: float
    trained: bool
    sampler_logprobs: tuple[float, ...]


def _samples(groups: Sequence[Group], config: RunConfig) -> list[_Sample]:
    rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float32)
    advantages = group_advantages(rewards, config.grpo.advantage)
    return [
        _Sample(
            row=Row(index, group.prompt_ids, reply.token_ids),
            advantage=float(advantages[index, place]),
            trained=reply.stopped or config.grpo.truncated != "mask",
            sampler_logprobs=reply.logprobs,
        )
        for index, group in enumerate(groups)
        for place, reply in enumerate(group.replies)
    ]


class _Batch:
    """One step's samples, cut into micro-batches, with the log-probs that all its updates are compared with."""

    def __init__(self, learner: Learner, groups: Sequence[Group], config: RunConfig) -> None:
        self.learner, self.config = learner, config
        samples = _samples(groups, config)
        needed = [s for s in samples if s.trained and (s.advantage != 0.0 or config.grpo.kl_coef > 0)]
        size = config.train.micro_batch_tokens or FALLBACK_MICRO_BATCH_TOKENS
        cut = micro_batches([s.row for s in needed], size, shared_prompts=learner.shared_prompts, padded=learner.padded)
        self.micro_batches = [[needed[i] for i in batch] for batch in cut]
        self.num_completions = len(samples)
        self.tokens_trained = sum(len(s.row.token_ids) for s in samples if s.trained)
        self.tokens_computed = sum(len(s.row.token_ids) for s in needed)
        self.means = Means()
        self._old: dict[int, Tensor] = {}
        self._base: dict[int, Tensor] = {}

    def losses(self, v: Tensor) -> Iterator[Tensor]:
        """The loss of each micro-batch under v; their sum is the step's."""
        grpo = self.config.grpo
        for index, batch in enumerate(self.micro_batches):
            rows = [s.row for s in batch]
            logprobs, mask = self.learner.logprobs(rows, v)
            old = self._old.setdefault(index, logprobs.detach())
            if grpo.kl_coef > 0 and index not in self._base:
                with torch.no_grad():
                    self._base[index] = self.learner.logprobs(rows, None)[0]
            sampler = torch.zeros_like(old)
            for i, s in enumerate(batch):
                sampler[i, : len(s.sampler_logprobs)] = torch.tensor(s.sampler_logprobs)
            loss, sums = policy_loss(
                logprobs,
                old,
                torch.tensor([s.advantage for s in batch], device=logprobs.device),
                mask,
                clip_low=grpo.clip_low,
                clip_high=grpo.clip_high,
                normalisation=grpo.normalisation,
                total_tokens=self.tokens_trained,
                total_completions=self.num_completions,
                sampler_logprobs=sampler,
                importance_cap=grpo.importance_cap,
                base_logprobs=self._base.get(index),
                kl_coef=grpo.kl_coef,
            )
            yield loss
            for name, value in sums.items():
                if name not in ("tokens", "completions"):
                    self.means.add(name, value, sums["tokens"])

    def check_gap(self, step: int) -> None:
        """Raises: UserError if learner and sampler are further apart than grpo.max_logprob_gap."""
        gap, most = self.means.result().get("sampler_gap", 0.0), self.config.grpo.max_logprob_gap
        if gap > most:
            raise UserError(
                f"step {step + 1}: sampler and learner log-probs differ by {gap:.3f} on average, more than "
                f"grpo.max_logprob_gap = {most}; the rollouts do not come from the model that is "
                "trained. v is kept as it was"
            )


def grpo_step(
    learner: Learner, groups: Sequence[Group], v: Tensor, optimizer: torch.optim.Optimizer, config: RunConfig, step: int
) -> dict[str, float]:
    """Update v in place on one batch of groups, `updates_per_batch` times; returns metrics, means over the whole step.

    Denominators count every trained token or completion of the batch; rows that cannot move v (advantage 0 and no KL)
    are counted but not computed. Old log-probs are the learner's own before the first update; the sampler's go into
    truncated importance sampling.

    Raises: UserError if the loss or gradient is not finite, or the learner's log-probs are further than
    grpo.max_logprob_gap from the sampler's. The update that failed leaves v unchanged.
    """
    batch = _Batch(learner, groups, config)

    def checked(update: int) -> Iterator[Tensor]:
        yield from batch.losses(v)
        if update == 0:  # before the optimiser moves v
            batch.check_gap(step)

    policy = grad_norm = 0.0
    updates = config.grpo.updates_per_batch
    for update in range(updates):
        losses, grad_norm = descend(v, optimizer, config, step, checked(update))
        for loss in losses:
            policy += loss / updates
    return {
        **batch.means.result(),
        "policy_loss": policy,
        "grad_norm": grad_norm,
        "tokens_trained": float(batch.tokens_trained),
        "tokens_computed": float(batch.tokens_computed),
    }
