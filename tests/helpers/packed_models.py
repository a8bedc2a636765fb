"""Tiny models of every architecture that the packed forward covers, batches for them, and what plain models give."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tinylora.adapter.attach import AttachedAdapter, attach
from tinylora.adapter.config import AdapterConfig
from tinylora.models.prefill import MIN_SHARED

COMMON: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**COMMON)),
    "llama3 rope": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            **COMMON,
            rope_parameters={
                "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            },
        ),
    ),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig(**COMMON, sliding_window=6)),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**COMMON, tie_word_embeddings=True)),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**COMMON, head_dim=16)),
    "gemma3": (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig(
            **COMMON, head_dim=12, sliding_window=5, query_pre_attn_scalar=24,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
}  # fmt: skip
HEAD = tuple(range(40, 40 + MIN_SHARED + 3))
PROMPTS = {
    "apart": [(11, 12, 13), (21, 22, 23, 24, 25, 26), (31,)],
    "common": [(*HEAD, 11), (*HEAD, 21, 22, 23, 24), (*HEAD, 31, 32)],
    "one": [(*HEAD, 11)],
    "single tokens": [(5,), (6,)],
}
"""Distinct prompts; "common" ones share a segment of their own."""


def build(name: str) -> PreTrainedModel:
    kind, config = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(copy.deepcopy(config))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.2)
            for path, parameter in model.named_parameters():
                if path.endswith("norm.weight"):
                    parameter.normal_(0.0 if name == "gemma3" else 1.0, 0.2)
    return model.to(torch.float32).eval()


def batch(kind: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    generator = torch.Generator().manual_seed(3)
    prompts = PROMPTS[kind]
    lengths = [4, 1, 6, 2, 5, 9, 1, 3]
    draw = lambda n: tuple(torch.randint(3, 259, (n,), generator=generator).tolist())  # noqa: E731
    return [prompts[i % len(prompts)] for i in range(len(lengths))], [draw(length) for length in lengths]


def adapted(model: PreTrainedModel, **options: Any) -> tuple[AttachedAdapter, Tensor]:
    adapter = attach(model, AdapterConfig(u=2, n_tie=5, **options))
    v = 0.3 * torch.randn(adapter.zeros().shape, generator=torch.Generator().manual_seed(1))
    return adapter, v.requires_grad_(True)


def plain(
    name: str, adapter: AttachedAdapter, v: Tensor, prompts: Sequence[tuple[int, ...]],
    completions: Sequence[tuple[int, ...]], temperature: float,
) -> list[Tensor]:  # fmt: skip
    """A fresh float64 copy of the plain model, its weights W + dW(v) as functions of v; autograd does the rest."""
    model = build(name).double()
    weights = {}
    for path, layer in adapter.layers.items():
        f = adapter.factors[path]
        R = torch.einsum("i,ijk->jk", v.double()[layer.tie_group], layer.P.double())
        weights[f"{path}.weight"] = (
            model.get_submodule(path).weight.detach() + (f.U * f.S).double() @ R @ f.V.double().T
        )
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        inputs = {"input_ids": torch.tensor([[*prompt, *completion]]), "use_cache": False}
        logits = torch.func.functional_call(model, weights, (), inputs).logits[0, len(prompt) - 1 : -1]
        scores = torch.log_softmax(logits / temperature, dim=-1)
        found.append(scores[torch.arange(len(completion)), torch.tensor(completion)])
    return found
