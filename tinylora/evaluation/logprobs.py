"""Log-probs of the whole vocabulary under base and adapter, in pieces that fit into memory, and the KL between them."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tinylora.adapter.trained import Trained
from tinylora.system.device import for_float64

Pair = tuple[Sequence[int], Sequence[int]]
"""Ids of a prompt, and of the completion whose tokens are looked at."""
LOGIT_BYTES = 2**28
"""Of the float32 logits of one forward pass; some five times that is held at the peak."""
_ROWS = 64
"""Tokens whose KL is summed at a time."""


def in_parts(pairs: Sequence[Pair], vocabulary: int, *, logit_bytes: int = LOGIT_BYTES) -> Iterator[list[Pair]]:
    """`pairs` in order, as many at a time as have logits of `logit_bytes` with their padding; at least one."""
    part: list[Pair] = []
    width = 0
    for pair in pairs:
        wider = max(width, len(pair[0]) + len(pair[1]))
        if part and 4 * vocabulary * wider * (len(part) + 1) > logit_bytes:
            yield part
            part, wider = [], len(pair[0]) + len(pair[1])
        part.append(pair)
        width = wider
    if part:
        yield part


def completion_logprobs(model: Any, adapter: Trained, pairs: Sequence[Pair], v: Tensor | None) -> Tensor:
    """Log-probs of the whole vocabulary at the positions that predict completion tokens: (tokens, vocabulary) float32.

    Tokens are in the order of the pairs.
    """
    device = model.device
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    ids = torch.zeros((len(pairs), width), dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(pairs):
        length = len(prompt) + len(completion)
        ids[i, :length] = torch.tensor([*prompt, *completion], device=device)
        mask[i, :length] = 1  # padding stands right, where a causal model never looks
    with adapter.using(v):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    rows = [logits[i, len(p) - 1 : len(p) + len(c) - 1] for i, (p, c) in enumerate(pairs)]
    return torch.cat(rows).float().log_softmax(-1)


def divergence(base: Tensor, tuned: Tensor) -> float:
    """Sum of KL(base || tuned) over the rows of two tensors of log-probs (tokens, vocabulary), nats; in float64."""
    pieces = zip(base.split(_ROWS), tuned.split(_ROWS), strict=True)
    return sum(total(b.exp() * (b - t)) for b, t in pieces)


def total(values: Tensor) -> float:
    """The sum, in float64."""
    return float(for_float64(values).sum(dtype=torch.float64))
