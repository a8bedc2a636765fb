"""How many tokens of a packed forward and backward pass fit into a memory budget.

Counts what frozen_ops.py keeps for the backward pass and the largest step on the way; nothing is tried out. The budget
is for activations: weights, factors and a KV cache of the engine come on top.
"""

from dataclasses import dataclass

from tinylora.adapter.layer import AdaptedLinear
from tinylora.errors import UserError
from tinylora.learner.frozen_ops import CACHED_ROWS, FrozenLinear, chunk_rows
from tinylora.learner.packed import BLOCK_SCORES
from tinylora.models.architecture import Architecture, DecoderLayer

FLOAT = 4
HEAP = {"cpu": 1.4}
"""Process memory over bytes in use, by device: between kept tensors of many sizes, glibc's heap is left with holes.

Measured with SmolLM2-135M: 1.3 to 1.7 with the heap as it comes, 1.0 where every tensor has its own mapping.
"""
FALLBACK_MICRO_BATCH_TOKENS = 4096
"""For models whose memory is not counted here."""
FEWEST_PADDED_TOKENS = 256
"""Of a padded micro-batch, whatever the budget: smaller ones take longer than they save."""


@dataclass(frozen=True, slots=True)
class ActivationBytes:
    """Bytes of one micro-batch: `fixed` + `a_token` x tokens."""

    fixed: int
    a_token: int


def _width(layer: DecoderLayer) -> int:
    return FrozenLinear.base(layer.gate).weight.shape[0]


def kept_bytes(layer: DecoderLayer, arch: Architecture) -> int:
    """Bytes a token leaves behind in one layer for its backward pass."""
    item = arch.dtype.itemsize
    heads, kv_heads = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    numbers = 2 * arch.hidden_size + heads + 2 * kv_heads + 2 * _width(layer)  # norms, attention, gate
    numbers += heads if layer.q_norm is not None else 0
    numbers += kv_heads if layer.k_norm is not None else 0
    out_norms = [norm for norm in (layer.attention_out_norm, layer.mlp_out_norm) if norm is not None]
    numbers += len(out_norms) * arch.hidden_size
    maps = (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)
    ranks = sum(module.A.shape[0] for module in maps if isinstance(module, AdaptedLinear))
    return item * numbers + FLOAT * ranks


def _passing(layer: DecoderLayer, arch: Architecture) -> int:
    """Bytes a token takes for a moment in the backward pass of one layer, in its MLP or its attention."""
    item = arch.dtype.itemsize
    heads, kv_heads = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    mlp = item * (5 * _width(layer) + 2 * arch.hidden_size) + FLOAT * _width(layer)
    attention = FLOAT * (4 * heads + 5 * kv_heads) + item * (2 * heads + 2 * kv_heads + arch.hidden_size)
    return max(mlp, attention)


def activation_bytes(architecture: Architecture, checkpointing: bool, device: str = "") -> ActivationBytes:
    """Peak bytes of activations in a forward and backward pass, every token counted as scored.

    `device` is the type of the device it will run on, where the weights are not there yet.
    """
    arch = architecture
    item = arch.dtype.itemsize
    head = 2 * item * arch.hidden_size
    passing = max(_passing(layer, arch) for layer in arch.layers)
    kept = [kept_bytes(layer, arch) for layer in arch.layers]
    held = len(arch.layers) * item * arch.hidden_size + max(kept) if checkpointing else sum(kept)
    logits = arch.vocab_size * (item * chunk_rows(arch.head.weight) + 3 * FLOAT * CACHED_ROWS)
    scores = 4 * FLOAT * BLOCK_SCORES
    heap = HEAP.get(device or arch.device.type, 1.0)
    return ActivationBytes(fixed=int(heap * max(logits, scores)), a_token=int(heap * (head + held + passing)))


def micro_batch_tokens_for(budget_bytes: int, architecture: Architecture, checkpointing: bool) -> int:
    """Most tokens (prompts and completions, as `micro_batches` counts them) of a micro-batch within budget_bytes.

    Raises: UserError if the budget does not hold even one token.
    """
    need = activation_bytes(architecture, checkpointing)
    tokens = (budget_bytes - need.fixed) // need.a_token
    if tokens < 1:
        gib = (need.fixed + need.a_token) / 2**30
        raise UserError(
            f"a memory budget of {budget_bytes / 2**30:.3g} GiB does not hold one token of a training step; this model "
            f"needs at least {gib:.3g} GiB, and {need.a_token / 2**20:.3g} MiB for every further token"
        )
    return int(tokens)
