"""Requests around the edges of the native engine's blocks, and vectors for them."""

import numpy as np
import torch
from engine_conformance import VOCABULARY, sampled
from torch import Tensor

from tinylora.adapter.attach import AttachedAdapter
from tinylora.generation.types import Request

LONG = tuple(int(x) for x in np.random.default_rng(7).integers(3, VOCABULARY, size=300))


def vectors(adapter: AttachedAdapter, count: int, scale: float = 0.3) -> list[Tensor]:
    shape = (count, adapter.num_groups, adapter.config.u)
    return list(torch.from_numpy(np.random.default_rng(0).normal(scale=scale, size=shape)).float())


def mixed_requests() -> list[Request]:
    """Lengths around whole blocks, shared beginnings, samples, and one prompt twice."""
    prompts = [
        LONG[:63],
        LONG[:64],
        LONG[:65],
        LONG[:128],
        LONG[1:4],
        LONG[:130],
        LONG[40:190],
        LONG[:64],
        (*LONG[:70], 5),
    ]
    samples = (1, 3, 1, 2, 5, 1, 1, 2, 1)
    budgets = (70, 3, 20, 66, 9, 64, 30, 65, 1)
    return [
        Request(prompt_ids=prompt, params=sampled(n=n, stop_token_ids=(4, 5, 6)), num_samples=count, key=i)
        for i, (prompt, count, n) in enumerate(zip(prompts, samples, budgets, strict=True))
    ]
