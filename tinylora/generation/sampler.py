"""From logits to one token a row: greedy, or by inverting the cumulative distribution at a counter-based uniform.

No noise tensor the size of the vocabulary is drawn: a row costs one uniform number, and which one it is depends only on
(seed, request key, sample, position), so a completion does not depend on what else is in the batch.
"""

import torch
from torch import Tensor

from tinylora.errors import UserError

BLOCK = 256


def invert_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """Smallest token whose cumulative probability exceeds uniform times the row's total.

    Shapes: probs (rows, vocabulary) float32, not necessarily normalised; uniform (rows,) float64 in [0, 1) -> token
    ids (rows,) int64. Sums run over blocks of 256 in float64, so that a vocabulary of 150,000 loses nothing; a token of
    probability 0 is never returned.
    """
    rows, vocabulary = probs.shape
    padded = torch.nn.functional.pad(probs, (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)
    block_cdf = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    target = (uniform * block_cdf[:, -1]).unsqueeze(-1)
    block = torch.searchsorted(block_cdf, target, right=True).clamp_max(block_cdf.shape[1] - 1)
    before = torch.where(block > 0, block_cdf.gather(1, (block - 1).clamp_min(0)), 0.0)
    chosen = padded[torch.arange(rows, device=probs.device), block.squeeze(-1)].double()
    within = torch.searchsorted(chosen.cumsum(-1), target - before, right=True)
    # Rounding can put the target a hair past the block's end: then its last token of positive probability is meant.
    positions = torch.arange(BLOCK, device=probs.device).expand(rows, -1)
    last = torch.where(chosen > 0, positions, 0).amax(-1, keepdim=True)
    return (block * BLOCK + torch.minimum(within, last)).squeeze(-1)


def sample(
    logits: Tensor, temperature: float, uniform: Tensor | None, forced: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability at the temperature (at 1 when greedy).

    Shapes: logits (rows, vocabulary), any float dtype; uniform (rows,) float64, None when temperature is 0; forced
    (rows,) int64, tokens to take instead of drawing, -1 for none.
    Returns token ids (rows,) int64 and log-probs (rows,) float32.
    Raises: UserError if a logit is not finite in a way that leaves no distribution (NaN or +inf).
    """
    scores = logits.float()
    if temperature > 0:
        scores = scores / temperature
    log_total = torch.logsumexp(scores, dim=-1)
    if not torch.isfinite(log_total).all():
        bad = int((~torch.isfinite(log_total)).sum())
        raise UserError(
            f"the model gave non-finite logits for {bad} of {len(log_total)} rows; "
            "try --set model.dtype=float32, or a smaller optim.lr if this happened during training"
        )
    if temperature > 0:
        assert uniform is not None
        tokens = invert_cdf(torch.exp(scores - log_total.unsqueeze(-1)), uniform)
    else:
        tokens = scores.argmax(-1)
    if forced is not None:
        tokens = torch.where(forced >= 0, forced, tokens)
    return tokens, scores.gather(1, tokens.unsqueeze(-1)).squeeze(-1) - log_total
