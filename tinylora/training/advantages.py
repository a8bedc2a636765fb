"""Rewards of a group of completions to one advantage per completion."""

from typing import Literal, get_args

import torch
from torch import Tensor

from tinylora.errors import UserError

AdvantageKind = Literal["group", "mean"]


def group_advantages(rewards: Tensor, kind: AdvantageKind, eps: float = 1e-4) -> Tensor:
    """Advantage of each completion over its group: A = r - mean(r), for "group" also divided by std(r) + eps.

    Shapes: rewards (groups, G), any real dtype -> (groups, G) in the same floating dtype (float32 for integers).
    The arithmetic is float64. A group whose rewards are all equal gets exactly 0, not the rounding error of its mean
    divided by eps.

    std is the unbiased one (divisor G - 1) and eps is added to it, not to the variance: TRL 1.16
    (`GRPOTrainer._generate_and_score_completions`, scale_rewards="group", eps 1e-4). verl takes the same std with
    eps 1e-6. DeepSeekMath (Shao et al. 2024, arXiv:2402.03300, section 4.1.2) writes std without saying which and has
    no eps. "mean" is scale_rewards="none", which Liu et al. 2025 (Dr. GRPO, arXiv:2503.20783, section 3) argue for.
    Raises: UserError for G below 2 or an unknown kind; ValueError for a wrong shape or a reward that is not finite.
    """
    if kind not in get_args(AdvantageKind):
        raise UserError(f"grpo.advantage must be one of {', '.join(get_args(AdvantageKind))}, got {kind!r}")
    _check(rewards)
    if rewards.shape[1] < 2:
        raise UserError(
            f"grpo.group_size must be at least 2, got {rewards.shape[1]}: completions of a group are compared"
        )
    exact = rewards.to("cpu", torch.float64)  # mps has no float64; a step has a few hundred rewards
    advantages = exact - exact.mean(dim=1, keepdim=True)
    if kind == "group":
        advantages = advantages / (exact.std(dim=1, correction=1, keepdim=True) + eps)
    advantages = advantages.masked_fill(zero_variance(exact)[:, None], 0.0)
    return advantages.to(rewards.device, rewards.dtype if rewards.is_floating_point() else torch.float32)


def zero_variance(rewards: Tensor) -> Tensor:
    """True for each group whose rewards are all equal (exactly), so that it carries no gradient.

    Shapes: rewards (groups, G) -> (groups,) bool. Raises: ValueError for a wrong shape or a reward that is not finite.
    """
    _check(rewards)
    return rewards.amax(dim=1) == rewards.amin(dim=1)


def _check(rewards: Tensor) -> None:
    if rewards.dim() != 2 or rewards.shape[1] == 0:
        raise ValueError(f"rewards must have shape (groups, G), got {tuple(rewards.shape)}")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("rewards must be finite: a scorer that fails stops the run before advantages are computed")
