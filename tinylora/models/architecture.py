"""What a decoder consists of, read off a transformers model: for code that runs its parts in an order of its own.

`describe` covers pre-norm decoders with rotary positions, grouped-query attention and a gated MLP: Llama, Mistral,
Qwen2, Qwen3 and Gemma 3 (text). Every field of the config must be one whose meaning is known here, and every module one
of the expected kind; anything else is `Unsupported`, with the reason, and callers fall back to the model's own forward.
Leaves out: experts, vision towers, packed (quantised) weights, soft caps, position schemes whose frequencies depend on
the length (dynamic, longrope).
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM, Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3RMSNorm

from tinylora.adapter.layer import AdaptedLinear
from tinylora.adapter.quantised import quantisation_of


class Unsupported(Exception):
    """The model has something that `describe` does not know; the message says what."""


NORMS: dict[type, type] = {
    LlamaForCausalLM: LlamaRMSNorm,
    MistralForCausalLM: MistralRMSNorm,
    Qwen2ForCausalLM: Qwen2RMSNorm,
    Qwen3ForCausalLM: Qwen3RMSNorm,
    Gemma3ForCausalLM: Gemma3RMSNorm,
}
"""The model classes covered, and the normalisation each of them uses."""

_SIZES = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act", "hidden_activation",
    "attention_bias", "mlp_bias", "tie_word_embeddings", "query_pre_attn_scalar",
}  # fmt: skip
"""Read from the modules themselves, or plain sizes."""
_NO_EFFECT = {
    "initializer_range", "use_cache", "attention_dropout", "pretraining_tp", "max_window_layers",
    "sliding_window_pattern", "use_sliding_window", "transformers_version", "model_type",
    "torch_dtype", "dtype", "architectures", "rope_theta", "rope_scaling", "cache_implementation", "default_theta",
    "bos_token_id", "eos_token_id", "pad_token_id", "is_llama_config", "transformers.js_config", "auto_map",
    "unsloth_version", "unsloth_fixed",
}  # fmt: skip
"""Without effect on a forward pass in eval mode, or already folded into a field that is looked at."""
_LOOKED_AT = {"rope_parameters", "layer_types", "sliding_window"}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Frequencies fixed when the model is built, whatever the length; the model's own buffers are used."""


@dataclass(frozen=True, eq=False, slots=True)
class DecoderLayer:
    """One block: x += out_norm(attention(norm(x))), then x += out_norm(mlp(norm(x))). None means there is no such norm.

    `q` to `down` are nn.Linear, or AdaptedLinear around one. `window` is the number of last positions a query sees (its
    own included), 0 for all.
    """

    input_norm: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    attention_out_norm: nn.Module | None
    mlp_norm: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    mlp_out_norm: nn.Module | None
    activation: nn.Module
    window: int
    rope: str


@dataclass(frozen=True, eq=False, slots=True)
class Architecture:
    """A decoder, part by part."""

    model: PreTrainedModel
    embed: nn.Module
    """Token ids -> hidden states, scaling included."""
    layers: tuple[DecoderLayer, ...]
    norm: nn.Module
    head: nn.Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    scale: float
    """What scores q.k are multiplied by."""
    norm_eps: float
    norm_adds_one: bool
    """Gemma: normalised x times (1 + w), rounded once; the others round before they multiply by w."""
    ropes: dict[str, tuple[Tensor, float]]
    """Inverse frequencies (head_dim / 2,) float32 and the factor on cos and sin, by `DecoderLayer.rope`."""

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights."""
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.head.weight.device

    def rope_tables(self, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """cos and sin by rope name, each (*positions.shape, head_dim) in the model's dtype, as transformers does it."""
        tables = {}
        for name, (inv_freq, factor) in self.ropes.items():
            angles = positions.unsqueeze(-1).float() * inv_freq
            angles = torch.cat([angles, angles], dim=-1)
            tables[name] = ((angles.cos() * factor).to(self.dtype), (angles.sin() * factor).to(self.dtype))
        return tables


def describe(model: PreTrainedModel) -> Architecture:
    """The parts of a model.

    Raises: Unsupported, with the reason, for anything whose meaning is not known here.
    """
    norm_type = NORMS.get(type(model))
    if norm_type is None:
        covered = ", ".join(kind.__name__ for kind in NORMS)
        raise Unsupported(f"{type(model).__name__} is not one of {covered}")
    config = cast(Any, model.config)
    if getattr(config, "quantization_config", None) or quantisation_of(model):
        raise Unsupported("its weights are quantised")
    _check_config(config)
    kinds = sorted({f"{str(p.dtype).removeprefix('torch.')} on {p.device}" for p in model.parameters()})
    if len(kinds) > 1:
        raise Unsupported(f"it has weights of different types: {', '.join(kinds)}")
    decoder = cast(Any, model).model
    gemma = isinstance(model, Gemma3ForCausalLM)
    ropes = _ropes(decoder.rotary_emb, config)
    layers = tuple(_layer(block, norm_type, config, gemma) for block in decoder.layers)
    attention = decoder.layers[0].self_attn
    head_dim = int(attention.head_dim)
    for name, (inv_freq, _) in ropes.items():
        if 2 * inv_freq.numel() != head_dim:
            raise Unsupported(f"only {2 * inv_freq.numel()} of {head_dim} dimensions are rotated ({name})")
    head: Any = cast(Any, model).lm_head
    if type(head) is not nn.Linear or cast(Any, head).bias is not None:
        raise Unsupported("the output head is not a plain linear map")
    return Architecture(
        model=model,
        embed=decoder.embed_tokens,
        layers=layers,
        norm=_norm(decoder.norm, norm_type),
        head=head,
        num_heads=int(config.num_attention_heads),
        num_kv_heads=int(config.num_key_value_heads),
        head_dim=head_dim,
        hidden_size=int(config.hidden_size),
        vocab_size=int(head.weight.shape[0]),
        scale=float(attention.scaling),
        norm_eps=float(config.rms_norm_eps),
        norm_adds_one=gemma,
        ropes=ropes,
    )


def _check_config(config: Any) -> None:
    known = _SIZES | _NO_EFFECT | _LOOKED_AT | set(PreTrainedConfig().to_dict())
    for key, value in config.to_dict().items():
        if key not in known and not key.startswith("_") and value not in (None, False):
            raise Unsupported(f"its config sets {key} = {value!r}, which is not known here")
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise Unsupported(f"it has layers of type {kind!r}")


def _ropes(rotary: Any, config: Any) -> dict[str, tuple[Tensor, float]]:
    parameters = config.rope_parameters
    nested = all(isinstance(value, dict) for value in parameters.values())
    ropes = {}
    for name, one in (parameters if nested else {"": parameters}).items():
        kind = one.get("rope_type", "default")
        if kind not in _ROPE_TYPES:
            raise Unsupported(f"its rope_type is {kind!r}; known: {', '.join(_ROPE_TYPES)}")
        prefix = f"{name}_" if nested else ""
        if hasattr(rotary, f"{prefix}inv_freq"):
            inv_freq = getattr(rotary, f"{prefix}inv_freq").detach().float()
            ropes[name] = (inv_freq, float(getattr(rotary, f"{prefix}attention_scaling")))
    return ropes


def _layer(block: Any, norm_type: type, config: Any, gemma: bool) -> DecoderLayer:
    attention, mlp = block.self_attn, block.mlp
    kind = getattr(attention, "layer_type", None)
    if hasattr(attention, "layer_type"):
        window = config.sliding_window if kind == "sliding_attention" else None
    else:  # Mistral: one window for every layer; Llama has none, whatever its config says
        window = config.sliding_window if norm_type is MistralRMSNorm else None
    after_attention = block.post_attention_layernorm
    return DecoderLayer(
        input_norm=_norm(block.input_layernorm, norm_type),
        q=_linear(attention.q_proj),
        k=_linear(attention.k_proj),
        v=_linear(attention.v_proj),
        o=_linear(attention.o_proj),
        q_norm=_norm(attention.q_norm, norm_type) if hasattr(attention, "q_norm") else None,
        k_norm=_norm(attention.k_norm, norm_type) if hasattr(attention, "k_norm") else None,
        attention_out_norm=_norm(after_attention, norm_type) if gemma else None,
        mlp_norm=_norm(block.pre_feedforward_layernorm if gemma else after_attention, norm_type),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
        mlp_out_norm=_norm(block.post_feedforward_layernorm, norm_type) if gemma else None,
        activation=mlp.act_fn,
        window=int(window or 0),
        rope=str(kind) if gemma else "",
    )


def _norm(module: nn.Module, expected: type) -> nn.Module:
    if type(module) is not expected:
        raise Unsupported(f"a {type(module).__name__} stands where a {expected.__name__} is expected")
    return module


def _linear(module: nn.Module) -> nn.Module:
    inner = module.base if isinstance(module, AdaptedLinear) else module
    if type(inner) is not nn.Linear or not inner.weight.dtype.is_floating_point:
        raise Unsupported(f"a {type(inner).__name__} stands where a plain linear map is expected")
    return module
