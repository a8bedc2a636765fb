"""Which models `describe` covers, that what it says of them is right, and what it refuses."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engine_conformance import CONTEXT, MODELS, PROMPTS, VOCABULARY, WINDOW, reference_logprobs, sampled, tiny
from torch import nn
from transformers import PreTrainedModel

from tinylora.adapter.attach import attach
from tinylora.adapter.config import AdapterConfig
from tinylora.adapter.layer import AdaptedLinear
from tinylora.generation.native.engine import NativeEngine
from tinylora.generation.types import Request
from tinylora.models.architecture import NORMS, Unsupported, describe

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def built(kind: str, **more: Any) -> PreTrainedModel:
    """A tiny model with random weights: `kind` as in LlamaForCausalLM."""
    config_class = {"Gemma3": "Gemma3Text"}.get(kind, kind)
    config = getattr(transformers, f"{config_class}Config")(**{**SIZES, **more})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, f"{kind}ForCausalLM")(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name and kind != "Gemma3" else 0.0, 0.2)
    return model.float().eval()


def check_engine(model: PreTrainedModel) -> None:
    """The native engine's log-probs are those of a full pass of transformers, over positions up to the context."""
    prompts = [*PROMPTS[1:], tuple(3 + i * 7 % 250 for i in range(CONTEXT - 12))]
    requests = [Request(prompt_ids=prompt, params=sampled(), key=i) for i, prompt in enumerate(prompts)]
    for completion in NativeEngine(model, context_length=CONTEXT).generate(requests):
        prompt = requests[completion.request_index].prompt_ids
        expected = reference_logprobs(model, prompt, completion.token_ids, 1.0)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=2e-5)


def test_every_class_is_in_the_conformance_suite() -> None:
    assert {type(tiny(name)) for name in MODELS} == set(NORMS)


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_are_those_of_the_model(name: str) -> None:
    model: Any = tiny(name)
    found = describe(model)
    decoder = model.model
    assert found.embed is decoder.embed_tokens
    assert found.norm is decoder.norm
    assert found.head is model.lm_head
    assert (found.vocab_size, found.hidden_size, found.dtype) == (VOCABULARY, 32, torch.float32)
    assert (found.num_heads, found.num_kv_heads) == (4, 2)
    assert found.head_dim == decoder.layers[0].self_attn.q_proj.out_features // 4
    assert found.scale == pytest.approx(found.head_dim**-0.5)
    assert found.norm_adds_one == (name == "gemma3")
    for layer, block in zip(found.layers, decoder.layers, strict=True):
        assert (layer.q, layer.down) == (block.self_attn.q_proj, block.mlp.down_proj)
        assert (layer.q_norm is None) == (name not in ("qwen3", "gemma3"))
        assert (layer.mlp_out_norm is None) == (name != "gemma3")
    windows = {"mistral": [WINDOW] * 3, "gemma3": [WINDOW, 0, WINDOW]}.get(name, [0, 0, 0])
    assert [layer.window for layer in found.layers] == windows


def test_maps_with_an_adapter_are_found_with_it() -> None:
    model = tiny("qwen2")
    adapter = attach(model, AdapterConfig(targets=("q_proj",)))
    layer = describe(model).layers[0]
    assert isinstance(layer.q, AdaptedLinear)
    assert type(layer.k) is nn.Linear
    adapter.detach()


ROPE = {"rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}}),
        (
            "Llama",
            {
                "rope_parameters": {
                    **ROPE,
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
        (
            "Qwen2",
            {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        ),
        ("Llama", {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
        ("Llama", {"rope_parameters": {**ROPE, "rope_type": "default", "partial_rotary_factor": 0.5}}),  # not looked at
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1, "head_dim": 16}),
        ("Qwen2", {"use_sliding_window": False, "sliding_window": 10}),
        ("Mistral", {"sliding_window": None}),
        ("Mistral", {"sliding_window": 33}),
        ("Llama", {"num_key_value_heads": 1}),
        ("Llama", {"num_key_value_heads": 4}),
        ("Gemma3", {"head_dim": 8, "query_pre_attn_scalar": 29, "sliding_window": 9}),
        (
            "Gemma3",
            {
                "head_dim": 16,
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                },
            },
        ),
        ("Llama", {"sliding_window": 10}),  # Llama knows no window, whatever its config says
    ],
    ids=str,
)
def test_what_is_covered_is_right(kind: str, more: dict[str, Any]) -> None:
    check_engine(built(kind, **more))


def test_smollm2s_own_config_is_fine() -> None:
    """The fields beyond Llama's that its config.json on the hub has."""
    more = {
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "pretraining_tp": 1,
        "torch_dtype": "float32",
    }
    check_engine(built("Llama", **more))


def converted(change: Callable[[Any], None]) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        model = built("Llama")
        change(model)
        return model

    return make


class OtherLinear(nn.Linear):
    pass


def _set_linear(model: Any) -> None:
    model.model.layers[1].mlp.up_proj = OtherLinear(32, 48, bias=False)


def _set_norm(model: Any) -> None:
    model.model.layers[1].input_layernorm = nn.RMSNorm(32)


def _set_head(model: Any) -> None:
    model.lm_head = nn.Linear(32, VOCABULARY)


def _halve_a_layer(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.bfloat16()


def _widen_a_norm(model: Any) -> None:
    model.model.norm.double()


def _set_config(**values: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name, value in values.items():
            setattr(model.config, name, value)

    return change


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny("gpt2"), "GPT2LMHeadModel is not one of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"),
        (lambda: tiny("bloom"), "BloomForCausalLM is not one of"),
        (
            lambda: built("Mixtral", num_local_experts=2, num_experts_per_tok=1, sliding_window=None),
            "MixtralForCausalLM is not one of",
        ),
        (lambda: built("Phi3"), "Phi3ForCausalLM is not one of"),
        (lambda: built("Llama", attention_sinks=4), "its config sets attention_sinks = 4, which is not known here"),
        (lambda: built("Llama", rope_interleaved=True), "its config sets rope_interleaved = True"),
        (
            lambda: built("Llama", rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 2.0}),
            "its rope_type is 'dynamic'; known: default, linear, llama3, yarn",
        ),
        (
            lambda: built(
                "Llama", rope_parameters={**ROPE, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
            ),
            "only 4 of 8 dimensions are rotated",
        ),
        (
            lambda: built("Gemma3", head_dim=16, final_logit_softcapping=30.0),
            "its config sets final_logit_softcapping = 30.0",
        ),
        (
            lambda: built("Gemma3", head_dim=16, attn_logit_softcapping=50.0),
            "its config sets attn_logit_softcapping = 50.0",
        ),
        (
            lambda: built("Gemma3", head_dim=16, use_bidirectional_attention=True),
            "its config sets use_bidirectional_attention = True",
        ),
        (converted(_set_config(quantization_config={"quant_method": "x"})), "quanti"),
        (converted(_set_config(layer_types=["full_attention", "linear_attention"])), "layers of type 'linear_att"),
        (converted(_set_linear), "a OtherLinear stands where a plain linear map is expected"),
        (converted(_set_norm), "a RMSNorm stands where a LlamaRMSNorm is expected"),
        (converted(_set_head), "the output head is not a plain linear map"),
        (converted(_halve_a_layer), "weights of different types"),
        (converted(_widen_a_norm), "weights of different types"),
        (lambda: built("Llama", hidden_act="relu"), "its activation is ReLU; known: SiLU, GELU"),
        (lambda: built("Llama", hidden_act="gelu"), "its activation is GELUActivation; known: SiLU, GELU"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_with_the_reason(make: Callable[[], PreTrainedModel], message: str) -> None:
    model = make()
    with pytest.raises(Unsupported, match=message):
        NativeEngine(model, context_length=CONTEXT)
