"""One step of Adam on v, the same for every algorithm that follows a gradient: rate, checks, clipping, moments."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tinylora.config.run import RunConfig
from tinylora.errors import UserError


def learning_rate(config: RunConfig, step: int) -> float:
    """Rate of one step (counted from 0): linear warm-up over warmup_steps, then constant."""
    warmup = config.optim.warmup_steps
    return config.optim.lr * (min(1.0, (step + 1) / warmup) if warmup else 1.0)


def make_optimizer(v: Tensor, config: RunConfig) -> torch.optim.Adam:
    """Adam on v alone, in the dtype of v (float32)."""
    optim = config.optim
    return torch.optim.Adam([v], lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)


def descend(
    v: Tensor, optimizer: torch.optim.Optimizer, config: RunConfig, step: int, losses: Iterable[Tensor]
) -> tuple[list[float], float]:
    """Move v in place by one step on the sum of `losses`, one a micro-batch, each backpropagated as it comes.

    Returns the losses and the gradient's norm before clipping. Without a loss nothing moves: Adam's momentum alone
    must not move v on a batch that says nothing.
    Raises: UserError if a loss or the gradient is not finite; v is then as it was.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.zero_grad(set_to_none=True)
    found: list[float] = []
    for loss in losses:
        if not torch.isfinite(loss):
            raise UserError(
                f"step {step + 1}: the loss is {float(loss.detach())}; v is kept as it was. "
                "Try a smaller optim.lr, or model.dtype = float32"
            )
        loss.backward()
        found.append(float(loss.detach()))
    if v.grad is None:
        return found, 0.0
    norm = float(v.grad.norm())
    if not math.isfinite(norm):
        raise UserError(f"step {step + 1}: the gradient is not finite; v is kept as it was. Try model.dtype = float32")
    if config.optim.max_grad_norm and norm > config.optim.max_grad_norm:
        v.grad.mul_(config.optim.max_grad_norm / norm)
    optimizer.step()
    return found, norm


def adam_state(v: Tensor, optimizer: torch.optim.Adam) -> dict[str, Any]:
    """Adam's moments as a checkpoint holds them; zeros before the first step."""
    moments = optimizer.state.get(v, {})
    zeros = torch.zeros_like(v)
    return {
        "adam_m": moments.get("exp_avg", zeros).cpu(),
        "adam_v": moments.get("exp_avg_sq", zeros).cpu(),
        "adam_step": float(moments.get("step", 0.0)),
    }


def restore_adam(v: Tensor, optimizer: torch.optim.Adam, saved: dict[str, Any]) -> None:
    """Put back what `adam_state` kept."""
    if saved["adam_step"]:
        optimizer.state[v] = {
            "step": torch.tensor(saved["adam_step"]),
            "exp_avg": saved["adam_m"].to(v.device),
            "exp_avg_sq": saved["adam_v"].to(v.device),
        }
