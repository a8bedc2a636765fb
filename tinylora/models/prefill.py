"""Prompts through the model once: what engine and learner share, with or without gradient.

What all prompts of a batch begin with (a system prompt, few-shot examples) is computed a single time and its keys and
values are expanded to the batch; then what is left of each prompt, padded on the left.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

MIN_SHARED = 8
"""Shared tokens below which a forward pass of their own is not worth it."""


@dataclass
class Prefilled:
    """A batch of prompts, ready to be continued."""

    cache: DynamicCache
    logits: Tensor
    """Of each prompt's last position, (prompts, vocabulary)."""
    mask: Tensor
    """Attention mask of the cache, (prompts, width) int64: 1 = a real token."""
    position: Tensor
    """Position of each prompt's last token, (prompts,)."""

    def select(self, index: Tensor) -> None:
        """Keep these rows, in this order, repeats allowed: that is how samples share their prompt."""
        self.cache.batch_select_indices(index)
        self.logits, self.mask, self.position = self.logits[index], self.mask[index], self.position[index]


@functools.cache
def _cache_name(forward: Callable[..., object]) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def with_cache(model: PreTrainedModel, cache: DynamicCache) -> dict[str, object]:
    """The arguments of a forward pass that reads and extends a cache: transformers 5.24 renamed one of them."""
    return {_cache_name(type(model).forward): cache, "use_cache": True}


def common_prefix_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with, at most the shortest one's length less one."""
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def can_select(model: PreTrainedModel) -> bool:
    """Whether rows of the model's cache can be chosen and repeated; the state of recurrent layers cannot."""
    return all(hasattr(layer, "batch_select_indices") for layer in DynamicCache(config=model.config).layers)


def _may_share(model: PreTrainedModel, ragged: bool) -> bool:
    """Whether a prefix computed alone gives the numbers of a full forward.

    Where prompts go on with unequal lengths, padding lies between the prefix and the rest. Rotary positions are told of
    it; a sliding window, a distance by place in the cache (ALiBi) and a recurrent state are not.
    """
    layers = DynamicCache(config=model.config).layers
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return False
    config = model.config.get_text_config()
    rotary = bool(getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None))
    return not ragged or (rotary and all(type(layer) is DynamicLayer for layer in layers))


def prefill(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], pad_token_id: int, *, share_prefix: bool = True
) -> Prefilled:
    """Run the prompts through the model. share_prefix must be off when rows carry adapter vectors of their own."""
    device = model.device
    shared = common_prefix_length(prompts) if share_prefix and len(prompts) > 1 else 0
    ragged = len(set(map(len, prompts))) > 1
    shared = shared if shared >= MIN_SHARED and _may_share(model, ragged) else 0
    cache = DynamicCache(config=model.config)
    if shared:
        head = torch.tensor([prompts[0][:shared]], device=device)
        keep = torch.tensor([shared - 1], device=device)
        model(input_ids=head, logits_to_keep=keep, **with_cache(model, cache))
        cache.batch_select_indices(torch.zeros(len(prompts), dtype=torch.long, device=device))
    width = max(map(len, prompts)) - shared
    ids = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros((len(prompts), shared + width), dtype=torch.long)
    mask[:, :shared] = 1
    for i, prompt in enumerate(prompts):
        ids[i, width - (len(prompt) - shared) :] = torch.tensor(prompt[shared:])
        mask[i, shared + width - (len(prompt) - shared) :] = 1
    mask = mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, shared:]
    # An index instead of the number 1: slicing leaves the states strided, and the product with the vocabulary then
    # copies the whole matrix once a row (7 GB for 128 rows of SmolLM2).
    logits = model(
        input_ids=ids.to(device),
        attention_mask=mask,
        position_ids=positions,
        logits_to_keep=torch.tensor([width - 1], device=device),
        **with_cache(model, cache),
    ).logits
    return Prefilled(cache, logits[:, -1], mask, positions[:, -1])
