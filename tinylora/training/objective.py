"""The GRPO loss, from log-probs to a scalar. No model, no reward, no config.

Every loss is divided by a count of the whole optimiser step, given by the caller, so the losses of the micro-batches
add up to the loss of the step and the split into micro-batches never moves it (beyond rounding).
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Normalisation = Literal["token", "sequence"]


def kl_terms(logprobs: Tensor, base_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(model || base): exp(b - l) - (b - l) - 1, never negative ("k3").

    Shapes: two equal ones -> the same. Its mean over tokens drawn from the model is the KL; its gradient is the one TRL
    and verl train with, which is not the gradient of that KL. Source: Schulman 2020 ("Approximating KL divergence"),
    DeepSeekMath (arXiv:2402.03300, equation 4).
    """
    log_ratio = base_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling: min(exp(old - sampler), cap) for each token, without gradient.

    Corrects for a sampler whose probabilities are not quite the learner's. Shapes: two equal ones -> the same.
    Source: Yao et al. 2025 ("Your efficient RL framework secretly brings you off-policy RL training"); TRL's
    vllm_importance_sampling_mode="token_truncate" with clip_max = cap and no clip_min. TRL takes 1 where the sampler
    gave NaN; here NaN goes through to the loss.
    """
    return (old_logprobs - sampler_logprobs).detach().exp().clamp(max=cap)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    normalisation: Normalisation,
    total_tokens: int,
    total_completions: int,
    sampler_logprobs: Tensor | None = None,
    importance_cap: float | None = None,
    base_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """A micro-batch's part of the step's loss, and sums to report.

        ratio = exp(l - old)
        term  = w * -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) + kl_coef * k3(l, base)

    token:    sum of term over trained tokens / total_tokens                           (TRL "dapo")
    sequence: sum over completions of the mean of term over its trained tokens / total_completions    (TRL "grpo")

    `w` is `importance_weights(old, sampler, importance_cap)`, or 1 without `sampler_logprobs`; as in TRL it does not
    weigh the KL.

    Shapes: logprobs, old_logprobs, sampler_logprobs, base_logprobs (completions, tokens), float32 or float64;
    advantages (completions,); loss_mask (completions, tokens) bool, True = trained. Only logprobs gets a
    gradient. What stands at untrained positions (padding, even NaN or -inf) changes nothing; NaN at a trained position
    makes the loss NaN.

    `total_tokens` and `total_completions` are counts of the whole step: all its trained tokens, and all its
    completions. A completion without a single trained token (a truncated one under truncated="mask") adds 0 to the sum
    and no token. Under "sequence" it counts in total_completions, as in TRL "grpo" and in verl's seq-mean-token-mean
    over a given global batch size (without one, verl leaves it out): masking a completion never makes the others weigh
    more. A total of 0 is taken as 1: nothing is trained, loss and gradient are exactly 0.

    Returns the loss (scalar, dtype of logprobs) and sums over this micro-batch's trained tokens, as floats to be added
    up over the step and divided by `tokens`: tokens, completions (rows with a trained token), ratio (sum of ratio),
    clipped_low and clipped_high (tokens whose gradient the clip cut), policy_kl (k3 of the model to `old_logprobs`'),
    importance (sum of w), importance_truncated (tokens where w was cut), sampler_gap (sum of |old - sampler|), base_kl
    (sum of k3 to the base, also at kl_coef 0). Without sampler_logprobs or base_logprobs their entries are left out.

    Source: DeepSeekMath (arXiv:2402.03300, equation 3) is "sequence"; DAPO (Yu et al. 2025, arXiv:2503.14476, equation
    8) is "token", with clip_low and clip_high apart. Departure: both average over the whole step, DAPO's over a group.
    Raises: ValueError for shapes or dtypes that do not fit, a total smaller than what this micro-batch alone holds, or
    an option without the tensor it needs.
    """
    if normalisation not in get_args(Normalisation):
        raise ValueError(f"normalisation must be one of {', '.join(get_args(Normalisation))}, got {normalisation!r}")
    if logprobs.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logprobs must be float32 or float64, got {logprobs.dtype}: half precision rounds the ratio")
    if logprobs.dim() != 2 or advantages.shape != logprobs.shape[:1]:
        raise ValueError(
            "logprobs must have shape (completions, tokens) and advantages (completions,), "
            f"got {tuple(logprobs.shape)} and {tuple(advantages.shape)}"
        )
    if loss_mask.dtype != torch.bool:
        raise ValueError(f"loss_mask must be bool, True where a token is trained, got {loss_mask.dtype}")
    named = {"old_logprobs": old_logprobs, "loss_mask": loss_mask}
    named |= {"sampler_logprobs": sampler_logprobs} if sampler_logprobs is not None else {}
    named |= {"base_logprobs": base_logprobs} if base_logprobs is not None else {}
    for name, tensor in named.items():
        if tensor.shape != logprobs.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, logprobs have {tuple(logprobs.shape)}")
    if sampler_logprobs is not None and not (importance_cap is not None and importance_cap > 0):
        raise ValueError(f"sampler_logprobs need an importance_cap above 0, got {importance_cap}")
    if kl_coef != 0 and base_logprobs is None:
        raise ValueError(f"kl_coef {kl_coef} needs base_logprobs")

    def trained(tensor: Tensor) -> Tensor:
        # Fill before any exp: 0 * inf is NaN, in the value and again in the gradient.
        return tensor.to(logprobs.dtype).masked_fill(~loss_mask, 0.0)

    current, old = trained(logprobs), trained(old_logprobs).detach()
    gain = advantages.to(logprobs.dtype)[:, None].detach()
    ratio = (current - old).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    terms = -torch.minimum(ratio * gain, clipped * gain)

    sums: dict[str, Tensor] = {}
    if sampler_logprobs is not None and importance_cap is not None:
        sampler = trained(sampler_logprobs).detach()
        weights = importance_weights(old, sampler, importance_cap)
        terms = terms * weights
        sums["importance"] = weights
        sums["importance_truncated"] = (old - sampler).exp() > importance_cap
        sums["sampler_gap"] = (old - sampler).abs()
    if base_logprobs is not None:
        base_kl = kl_terms(current, trained(base_logprobs).detach())
        sums["base_kl"] = base_kl
        if kl_coef != 0:
            terms = terms + kl_coef * base_kl

    # The ratio is 1 where nothing is trained, so every term there must still be masked out.
    terms = terms.masked_fill(~loss_mask, 0.0)
    row_tokens = loss_mask.sum(dim=1)
    if normalisation == "token":
        loss = terms.sum() / max(total_tokens, 1)
    else:
        loss = (terms.sum(dim=1) / row_tokens.clamp(min=1)).sum() / max(total_completions, 1)

    sums["tokens"] = loss_mask
    sums["ratio"] = ratio
    sums["clipped_low"] = (ratio < 1 - clip_low) & (gain < 0)
    sums["clipped_high"] = (ratio > 1 + clip_high) & (gain > 0)
    sums["policy_kl"] = kl_terms(current, old)
    masked = [value.detach().to(logprobs.dtype).masked_fill(~loss_mask, 0.0).sum() for value in sums.values()]
    rows = (row_tokens > 0).sum().to(logprobs.dtype)
    values = torch.stack([*masked, rows]).tolist()  # one transfer from the device
    stats = dict(zip([*sums, "completions"], values, strict=True))

    if total_tokens < stats["tokens"] or total_completions < stats["completions"]:
        raise ValueError(
            f"total_tokens {total_tokens} and total_completions {total_completions} count the whole step, yet this "
            f"micro-batch alone holds {stats['tokens']:.0f} and {stats['completions']:.0f}"
        )
    return loss, stats
