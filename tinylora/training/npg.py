"""NPG on v: the natural gradient of a policy with few enough numbers that its curvature is known exactly.

A step: score every reply (d/dv of its log-prob, d numbers), g = mean of A s, F = running mean of s s^T, and go along
F^-1 g until the model has moved by optim.kl_step nats a reply. No learning rate: the step is the same whatever the
scale or the basis of v. docs/natural-gradient.md derives it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinylora.adapter.attach import AttachedAdapter
from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.learner.learner import Learner, Row
from tinylora.learner.memory import FALLBACK_MICRO_BATCH_TOKENS
from tinylora.learner.scores import reply_scores, score_batches
from tinylora.rollouts.groups import Group, Rollouts, sample_step
from tinylora.rollouts.order import DataOrder
from tinylora.rollouts.runtime import Runtime
from tinylora.talk import Say
from tinylora.training import natural
from tinylora.training.algorithm import Algorithm, rollout_metrics
from tinylora.training.metrics import Means
from tinylora.training.natural import NUMBERS_A_REPLY, Curvature

NO_NOISE = 0.05
"""p below which a step counts as more than noise."""


class Npg(Algorithm):
    """Natural policy gradient with leave-one-out advantages and a KL budget in place of a rate."""

    def __init__(self, runtime: Runtime, learner: Learner, v: Tensor) -> None:
        """With nothing remembered: the first batch alone decides the first step."""
        super().__init__(runtime, learner, v)
        self.curvature = Curvature(v.numel(), runtime.config.optim.curvature_decay)
        self.gradient = torch.zeros(v.numel(), dtype=torch.float64)
        self.gradient_weight = 0.0
        self.squares = torch.zeros_like(self.gradient)
        self.squares_weight = 0.0

    @staticmethod
    def check(runtime: Runtime, say: Say) -> None:
        """Raises: UserError for a method without a v a row, more numbers than the replies carry, settings of others."""
        config, adapter = runtime.config, runtime.adapter
        if not isinstance(adapter, AttachedAdapter):
            raise UserError(
                f"train.algorithm = npg scores every reply by itself, which takes a v for each row of a batch; "
                f"method.name = {config.method.name} has none: take grpo, or method.name = tinylora"
            )
        most = most_numbers(config)
        if adapter.num_trained > most:
            raise UserError(
                f"train.algorithm = npg knows the curvature of at most {most:,} numbers from "
                f"{config.grpo.prompts_per_step * config.grpo.group_size:,} replies a step (optim.curvature_decay = "
                f"{config.optim.curvature_decay:g}), and {adapter.num_trained:,} are trained: take more replies, fewer "
                "numbers, or grpo"
            )
        if config.grpo.kl_coef:
            raise UserError(
                "grpo.kl_coef is of grpo's loss; with npg set optim.kl_total, the nats that v may go from the base"
            )
        if config.grpo.updates_per_batch != 1:
            raise UserError(f"grpo.updates_per_batch must be 1 with npg, got {config.grpo.updates_per_batch}")

    @staticmethod
    def learner_temperature(runtime: Runtime) -> float:
        """That of the rollouts: the policy is what is sampled from."""
        return runtime.config.generation.temperature

    def step(self, order: DataOrder, step: int) -> tuple[dict[str, Any], Rollouts]:
        """Sample groups under v, score them, move v.

        Raises: UserError for a number that moves nothing, a score that is not finite, or replies that do not come from
        the model that is trained; v is then as it was.
        """
        config = self.runtime.config
        rollouts = sample_step(self.runtime, order, self.v.detach().clone())
        batch = self._score(rollouts.groups, step)
        for _ in range(config.grpo.signal_batches - 1 if config.grpo.until_signal else 0):
            if batch.signal.p < NO_NOISE:
                break
            more = sample_step(self.runtime, order, self.v.detach().clone())
            rollouts = Rollouts(
                [*rollouts.groups, *more.groups], [*rollouts.sampled, *more.sampled], rollouts.seconds + more.seconds
            )
            batch = batch.with_more(self._score(more.groups, step), _seed(config, step))
        return {**rollout_metrics(rollouts), **batch.means.result(), **self._move(batch, step)}, rollouts

    def learn(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Score groups and move v; metrics. What a step does behind its sampling."""
        return self._move(self._score(groups, step), step)

    def _score(self, groups: Sequence[Group], step: int) -> "_Batch":
        """Scores of all replies of the groups, and how far the sampler's log-probs are from the learner's."""
        config = self.runtime.config
        rows = [
            Row(index, group.prompt_ids, reply.token_ids)
            for index, group in enumerate(groups)
            for reply in group.replies
        ]
        replies = [reply for group in groups for reply in group.replies]
        scores = torch.zeros(len(rows), self.v.numel(), dtype=torch.float64)
        weights = torch.ones(len(rows), dtype=torch.float64)
        means = Means()
        size = config.train.micro_batch_tokens or FALLBACK_MICRO_BATCH_TOKENS
        for part in score_batches(rows, self.v.numel(), size):
            found = reply_scores(self.learner, [rows[i] for i in part], self.v)
            scores[part] = found.scores.flatten(1).double().cpu()
            for i, logprobs in zip(part, found.logprobs, strict=True):
                gap = logprobs.double().cpu() - torch.tensor(replies[i].logprobs, dtype=torch.float64)
                ratio = math.exp(min(float(gap.sum()), 50.0))
                weights[i] = min(ratio, config.grpo.importance_cap)
                means.add("sampler_gap", float(gap.abs().sum()), len(gap))
                means.add("importance", float(weights[i]))
                means.add("importance_truncated", float(ratio > config.grpo.importance_cap))
        mean_gap, most = means.result().get("sampler_gap", 0.0), config.grpo.max_logprob_gap
        if not mean_gap <= most:
            raise UserError(
                f"step {step + 1}: sampler and learner log-probs differ by {mean_gap:.3f} on average, more than "
                f"grpo.max_logprob_gap = {most}; the rollouts do not come from the model that is trained. v is kept as "
                "it was"
            )
        rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float64)
        counted = [float(reply.stopped or config.grpo.truncated != "mask") for reply in replies]
        weights = weights.view(rewards.shape) * torch.tensor(counted).view(rewards.shape)
        return _Batch.of(rewards, scores.view(*rewards.shape, -1), weights, means, _seed(config, step))

    def _move(self, batch: "_Batch", step: int) -> dict[str, float]:
        """Take the batch in and move v in place; metrics."""
        optim = self.runtime.config.optim
        scores = batch.scores.flatten(0, 1)
        self.curvature.update(scores)
        F = self.curvature.matrix()
        if dead := natural.dead_numbers(F):
            raise UserError(
                f"step {step + 1}: number {', '.join(map(str, dead[:5]))} of v moves no reply (its curvature is 0), so "
                "it cannot be trained; v is kept as it was. Choose adapter.targets so that each one acts"
            )
        cut, share = natural.clipped(scores, F)
        g = (batch.advantages * batch.weights).flatten() @ cut / len(cut)
        metrics = {
            "signal_p": batch.signal.p,
            "signal_ratio": batch.signal.ratio,
            "scores_clipped": share,
            "curvature_replies": self.curvature.replies,
            "grad_norm": float(g.norm()),
            "tokens_trained": batch.tokens,
            "tokens_computed": batch.tokens,
        }
        v = self.v.detach().flatten().double().cpu()
        dv = torch.zeros_like(v)
        if bool((g != 0).any()):  # a batch that says nothing does not move v: nor does what is remembered
            direction = self._direction(g, F)
            dv = natural.along(direction, F, optim.kl_step)
            if optim.kl_total:
                dv = natural.within_total(v, dv, F, optim.kl_total)
        if not bool(torch.isfinite(dv).all()):
            raise UserError(f"step {step + 1}: the step is not finite; v is kept as it was. Try model.dtype = float32")
        with torch.no_grad():
            self.v.add_(dv.view(self.v.shape).to(self.v))
        now = self.v.detach().flatten().double().cpu()
        return {**metrics, "kl_step": float(dv @ F @ dv) / 2, "kl_base": natural.kl_from_base(now, F)}

    def _direction(self, g: Tensor, F: Tensor) -> Tensor:
        """Remember g, and say where a step goes: F^-1 of the remembered gradient, or where Adam would go."""
        optim = self.runtime.config.optim
        self.gradient = optim.momentum * self.gradient + (1 - optim.momentum) * g
        self.gradient_weight = optim.momentum * self.gradient_weight + (1 - optim.momentum)
        mean = self.gradient / self.gradient_weight
        if optim.direction == "natural":
            return natural.solve(F, mean)
        self.squares = optim.beta2 * self.squares + (1 - optim.beta2) * g.square()
        self.squares_weight = optim.beta2 * self.squares_weight + (1 - optim.beta2)
        return mean / ((self.squares / self.squares_weight).sqrt() + optim.eps)

    def state(self) -> dict[str, Any]:
        """Curvature and remembered gradient."""
        return {
            **self.curvature.state(),
            "npg_gradient": self.gradient,
            "npg_gradient_weight": self.gradient_weight,
            "npg_gradient_squares": self.squares,
            "npg_gradient_squares_weight": self.squares_weight,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Put them back."""
        self.curvature.restore(saved)
        self.gradient, self.gradient_weight = saved["npg_gradient"], saved["npg_gradient_weight"]
        self.squares, self.squares_weight = saved["npg_gradient_squares"], saved["npg_gradient_squares_weight"]


@dataclass(frozen=True, eq=False, slots=True)
class _Batch:
    """Replies of a step by prompts, (prompts, G), and what they say together."""

    advantages: Tensor
    scores: Tensor
    """(prompts, G, numbers)."""
    weights: Tensor
    """Of each reply: truncated importance of learner over sampler, 0 for one that is left out."""
    means: Means
    signal: natural.Signal
    tokens: float

    @classmethod
    def of(cls, rewards: Tensor, scores: Tensor, weights: Tensor, means: Means, seed: int) -> "_Batch":
        advantages = natural.leave_one_out(rewards)
        return cls(
            advantages, scores, weights, means, natural.signal(advantages, scores, seed), means.count("sampler_gap")
        )

    def with_more(self, other: "_Batch", seed: int) -> "_Batch":
        """Both together."""
        advantages = torch.cat([self.advantages, other.advantages])
        scores = torch.cat([self.scores, other.scores])
        means = self.means.with_more(other.means)
        weights = torch.cat([self.weights, other.weights])
        found = natural.signal(advantages, scores, seed)
        return _Batch(advantages, scores, weights, means, found, self.tokens + other.tokens)


def _seed(config: RunConfig, step: int) -> int:
    return config.train.seed * 1_000_003 + step


def most_numbers(config: RunConfig) -> int:
    """How many numbers the replies of a run's running mean carry."""
    decay = config.optim.curvature_decay
    replies = config.grpo.prompts_per_step * config.grpo.group_size * (1 + decay) / (1 - decay)
    return int(NUMBERS_A_REPLY * replies)
