"""How many bytes a run holds, estimated from shapes: weights, factors, KV cache, activations, trained numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tinylora.adapter.attach import linear_maps, output_head_path
from tinylora.adapter.quantised import quantisation, quantisation_of, stored_bytes, weight_shape
from tinylora.config.run import RunConfig
from tinylora.learner.memory import FALLBACK_MICRO_BATCH_TOKENS, FEWEST_PADDED_TOKENS, activation_bytes
from tinylora.methods.estimate import padded_bytes_a_token, state_bytes
from tinylora.models.architecture import Unsupported, describe
from tinylora.models.quantise import bytes_a_weight
from tinylora.system.device import resolve_device

MAPS_A_BLOCK = 7
"""q, k, v, o, gate, up, down."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Estimated bytes while training; the activations are a rough count for a usual decoder block."""

    weights: int
    adapter_factors: int
    kv_cache: int
    activations: int
    packed_copy: int = 0
    """Of the weights: the rollout engine's copy in its own layout, which it does without where there is no room."""
    state: int = 0
    """The trained numbers and all that goes with them: gradient, Adam's moments, the best ones, a checkpoint."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter_factors + self.kv_cache + self.activations + self.state

    @property
    def least(self) -> int:
        """All without what can be done without."""
        return self.total - self.packed_copy


def num_parameters(model: nn.Module) -> int:
    """Parameters of the base, tied ones once; packed ones by what they stand for."""
    packed = {id(m.weight): math.prod(weight_shape(m)) for m in model.modules() if quantisation(m)}
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def weight_bytes(model: nn.Module, itemsize: int, kind: str = "none") -> int:
    """Bytes of the base's weights; `kind`: how a model that is not loaded would be quantised."""
    if quantisation_of(model):
        return sum(stored_bytes(parameter) for parameter in model.parameters())
    head, each = output_head_path(model), bytes_a_weight(kind, itemsize)
    inside = sum(math.prod(weight_shape(module)) for path, module in linear_maps(model).items() if path != head)
    return int((num_parameters(model) - inside) * itemsize + inside * each)


def memory_estimate(
    model: nn.Module,
    config: RunConfig,
    shapes: Mapping[str, tuple[int, int]],
    itemsize: int,
    prompt_tokens: int,
    trained: int = 0,
) -> Memory:
    """Bytes for training with this config. `shapes`: (out, in) of every adapted module by path; `itemsize`: of the
    weights; `trained`: numbers.

    Weights count twice where the native engine packs a copy of them. Activations are those of one micro-batch, by
    `learner/memory.py`; for a model that the packed learner does not cover, per token: per block 12 values of the
    hidden size and 4 of the MLP's (once per model plus one per block with gradient checkpointing), and logits three
    times in float32 (logits, log-probs, gradient).
    """
    base: Any = model
    text: Any = base.config.get_text_config()
    layers, hidden, heads = text.num_hidden_layers, text.hidden_size, text.num_attention_heads
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    rows = min(config.generation.max_batch_rows, config.grpo.prompts_per_step * config.grpo.group_size)
    length = prompt_tokens + config.generation.max_new_tokens
    block = 12 * hidden + 4 * inner
    kept = block + layers * hidden if config.train.gradient_checkpointing else layers * block
    checkpointing = config.train.gradient_checkpointing
    copies, is_packed = 1, False
    engine_maps, is_covered = 0, False
    is_quantised = config.model.quantization != "none" or bool(quantisation_of(model))
    try:
        if is_quantised:
            raise Unsupported("its weights are quantised")
        architecture = describe(base)
    except Unsupported:
        tokens = max(config.train.micro_batch_tokens or FALLBACK_MICRO_BATCH_TOKENS, length)
        activations = tokens * (kept * itemsize + 3 * 4 * text.vocab_size)
    else:
        need = activation_bytes(architecture, checkpointing, resolve_device(config.model.device).type)
        budget = int(config.train.memory_budget_gib * 2**30)
        tokens = config.train.micro_batch_tokens or max(0, budget - need.fixed) // need.a_token
        activations = need.fixed + need.a_token * max(tokens, length)
        is_native, is_covered = config.generation.backend == "native", True
        is_packed = is_native and resolve_device(config.model.device).type == "cpu"
        engine_maps = MAPS_A_BLOCK * len(architecture.layers) if is_native else 0
    method = config.method
    rank, u = config.adapter.rank, config.adapter.u
    if method.name == "lora-xs":
        rank, u = method.rank, method.rank**2
    on_host = resolve_device(config.model.device).type != "cuda"
    factors = factor_bytes(shapes, rank, u, itemsize, on_host=on_host, engine_maps=engine_maps, is_covered=is_covered)
    is_other = method.name not in ("tinylora", "lora-xs")
    if is_other or is_quantised:
        each = padded_bytes_a_token(model, method, shapes, itemsize, checkpointing)
        budget = int(config.train.memory_budget_gib * 2**30)
        tokens = config.train.micro_batch_tokens or max(FEWEST_PADDED_TOKENS, budget // each)
        activations = each * max(tokens, length)
    if is_other:
        factors = 4 * trained if method.name in ("lora", "qlora", "dora", "vera") else 0
        copies += method.name == "full"  # the weights with v in them
    weights = num_parameters(model) * itemsize
    if is_quantised:
        weights = weight_bytes(model, itemsize, config.model.quantization)
    return Memory(
        weights=(copies + is_packed) * weights,
        packed_copy=is_packed * weights,
        adapter_factors=factors,
        kv_cache=rows * length * 2 * layers * kv_heads * head_dim * itemsize,
        activations=activations,
        state=state_bytes(trained) if method.name != "tinylora" else 0,
    )


def factor_bytes(
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    u: int,
    itemsize: int,
    *,
    on_host: bool,
    engine_maps: int,
    is_covered: bool,
) -> int:
    """Bytes of all copies of U, S, V and P of an attached adapter.

    The adapter holds them in float64, in main memory (which counts with `on_host`), its layers in float32; the native
    engine has A, B and P again, P for each of the `engine_maps` maps that it knows (0 without that engine), and the
    packed learner (`is_covered`) B and P, and A and B in three pieces where the base's numbers are narrower.
    """
    each = 4 + 8 * on_host
    inside = each + 4 * bool(engine_maps) + (3 * itemsize if is_covered and itemsize < 4 else 0)
    outside = inside + 4 * is_covered
    sides = sum(rank * (inside * i + outside * o) for o, i in shapes.values())
    return sides + u * rank**2 * ((each + 4 * is_covered) * len(shapes) + 4 * engine_maps)
