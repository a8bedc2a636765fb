"""One GRPO step on v: from rollouts to advantages, micro-batches, gradient, Adam."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.learner.learner import Learner, Row, micro_batches
from tinylora.learner.memory import FALLBACK_MICRO_BATCH_TOKENS
from tinylora.rollouts.groups import Group
from tinylora.training.advantages import group_advantages
from tinylora.training.metrics import Means
from tinylora.training.objective import policy_loss


@dataclass(frozen=True, slots=True)
class _Sample:
    row: Row
    advantage: float
    trained: bool
    sampler_logprobs: tuple[float, ...]


def _samples(groups: list[Group], config: RunConfig) -> list[_Sample]:
    rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float32)
    advantages = group_advantages(rewards, config.grpo.advantage)
    return [
        _Sample(
            row=Row(index, group.prompt_ids, completion.token_ids),
            advantage=float(advantages[index, sample]),
            trained=completion.finish_reason == "stop" or config.grpo.truncated != "mask",
            sampler_logprobs=completion.logprobs,
        )
        for index, group in enumerate(groups)
        for sample, completion in enumerate(group.completions)
    ]


def learning_rate(config: RunConfig, step: int) -> float:
    """Rate of one step (counted from 0): linear warm-up over warmup_steps, then constant."""
    warmup = config.optim.warmup_steps
    return config.optim.lr * (min(1.0, (step + 1) / warmup) if warmup else 1.0)


def make_optimizer(v: Tensor, config: RunConfig) -> torch.optim.Adam:
    """Adam on v alone, in the dtype of v (float32)."""
    optim = config.optim
    return torch.optim.Adam([v], lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)


def grpo_step(
    learner: Learner, groups: list[Group], v: Tensor, optimizer: torch.optim.Optimizer, config: RunConfig, step: int
) -> dict[str, float]:
    """Update v in place on one batch of groups, `updates_per_batch` times; returns metrics, means over the whole step.

    Denominators count every trained token or completion of the batch; rows that cannot move v (advantage 0 and no KL)
    are counted but not computed. Old log-probs are the learner's own before the first update; the sampler's go into
    truncated importance sampling.

    Raises: UserError if the loss or gradient is not finite, or the learner's log-probs are further than
    grpo.max_logprob_gap from the sampler's. The update that failed leaves v unchanged.
    """
    samples = _samples(groups, config)
    total_tokens = sum(len(s.row.token_ids) for s in samples if s.trained)
    needed = [s for s in samples if s.trained and (s.advantage != 0.0 or config.grpo.kl_coef > 0)]
    batches = [
        [needed[i] for i in batch]
        for batch in micro_batches(
            [s.row for s in needed],
            config.train.micro_batch_tokens or FALLBACK_MICRO_BATCH_TOKENS,
            shared_prompts=learner.shared_prompts,
            padded=learner.padded,
        )
    ]
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    old: dict[int, Tensor] = {}
    base: dict[int, Tensor] = {}
    grad_norm = policy = 0.0
    means = Means()
    for update in range(config.grpo.updates_per_batch):
        optimizer.zero_grad(set_to_none=True)
        for index, batch in enumerate(batches):
            rows = [s.row for s in batch]
            logprobs, mask = learner.logprobs(rows, v)
            old.setdefault(index, logprobs.detach())
            if config.grpo.kl_coef > 0 and index not in base:
                with torch.no_grad():
                    base[index] = learner.logprobs(rows, None)[0]
            sampler = torch.zeros_like(old[index])
            for i, s in enumerate(batch):
                sampler[i, : len(s.sampler_logprobs)] = torch.tensor(s.sampler_logprobs)
            loss, sums = policy_loss(
                logprobs,
                old[index],
                torch.tensor([s.advantage for s in batch], device=logprobs.device),
                mask,
                clip_low=config.grpo.clip_low,
                clip_high=config.grpo.clip_high,
                normalisation=config.grpo.normalisation,
                total_tokens=total_tokens,
                total_completions=len(samples),
                sampler_logprobs=sampler,
                importance_cap=config.grpo.importance_cap,
                base_logprobs=base.get(index),
                kl_coef=config.grpo.kl_coef,
            )
            if not torch.isfinite(loss):
                raise UserError(
                    f"step {step + 1}: the loss is {float(loss.detach())}; v is kept as it was. "
                    "Try a smaller optim.lr, or model.dtype = float32"
                )
            loss.backward()
            policy += float(loss.detach()) / config.grpo.updates_per_batch
            for name, value in sums.items():
                if name not in ("tokens", "completions"):
                    means.add(name, value, sums["tokens"])
        if update == 0:
            _check_gap(means.result().get("sampler_gap", 0.0), config, step)
        if v.grad is None:
            v.grad = torch.zeros_like(v)
        grad_norm = float(v.grad.norm())
        if not math.isfinite(grad_norm):
            raise UserError(
                f"step {step + 1}: the gradient is not finite; v is kept as it was. Try model.dtype = float32"
            )
        if config.optim.max_grad_norm and grad_norm > config.optim.max_grad_norm:
            v.grad.mul_(config.optim.max_grad_norm / grad_norm)
        # A batch without a single useful row says nothing: Adam's momentum alone must not move v on it.
        if batches:
            optimizer.step()
    computed = sum(len(s.row.token_ids) for s in needed)
    return {
        **means.result(),
        "policy_loss": policy,
        "grad_norm": grad_norm,
        "tokens_trained": float(total_tokens),
        "tokens_computed": float(computed),
    }


def _check_gap(gap: float, config: RunConfig, step: int) -> None:
    if gap > config.grpo.max_logprob_gap:
        raise UserError(
            f"step {step + 1}: sampler and learner log-probs differ by {gap:.3f} on average, more than "
            f"grpo.max_logprob_gap = {config.grpo.max_logprob_gap}; the rollouts do not come from the model that is "
            "trained. v is kept as it was"
        )
