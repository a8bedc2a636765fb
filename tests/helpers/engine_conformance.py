"""What the conformance suite of the engines is made of: backends, tiny models, and references that share no code."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from scipy.stats import chisquare
from transformers import PreTrainedModel

from tinylora.generation.types import Completion, Request, SamplingParams

BACKENDS = ["transformers", "native"]
"""Every engine that has to pass."""

VOCABULARY = 259
CONTEXT = 128
WINDOW = 8
"""Sliding window of the tiny models that have one: shorter than most of the sequences."""
PROMPTS = [
    tuple(int(x) for x in np.random.default_rng(i).integers(3, VOCABULARY, size=size))
    for i, size in enumerate((1, 2, 5, 9, 17, 40))
]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12)


def make_engine(backend: str, model: PreTrainedModel, **more: Any) -> Any:
    """An engine of that name; `generate(requests)` is all that the suite uses."""
    more = {"context_length": CONTEXT, **more}
    if backend == "transformers":
        from tinylora.generation.transformers_backend import TransformersEngine

        return TransformersEngine(model, **more)
    from tinylora.generation.native.engine import NativeEngine  # type: ignore[import-not-found, unused-ignore]

    return NativeEngine(model, **more)


_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llama": lambda: (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**_SMALL, tie_word_embeddings=False),
    ),
    "mistral": lambda: (  # every layer slides
        transformers.MistralForCausalLM,
        transformers.MistralConfig(**_SMALL, head_dim=8, sliding_window=WINDOW),
    ),
    "qwen2": lambda: (  # biases in q, k and v
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config(**_SMALL, tie_word_embeddings=True),
    ),
    "qwen3": lambda: (  # norms of q and k, heads wider than the hidden size
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config(**_SMALL, head_dim=16, tie_word_embeddings=True),
    ),
    "gemma3": lambda: (  # sliding and full layers, four norms a layer
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig(
            **_SMALL,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "gpt2": lambda: (  # weights stored (in, out), learned positions
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=CONTEXT,
            bos_token_id=None,
            eos_token_id=None,
        ),
    ),
    "bloom": lambda: (  # takes no position ids
        transformers.BloomForCausalLM,
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, eos_token_id=None),
    ),
}
MODELS = ["llama", "mistral", "qwen2", "qwen3", "gemma3"]
"""Architectures of the suite."""
OTHER_MODELS = ["gpt2", "bloom"]
"""Further ones, for the backend that runs any model."""


def tiny(name: str) -> PreTrainedModel:
    """A new tiny model with random weights, float32."""
    model_class, config = _MODELS[name]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        if name != "bloom":
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    # Far from the usual small weights, under which all answers are alike.
                    parameter.normal_(1.0 if "norm" in key and name != "gemma3" else 0.0, 0.2)
    model.generation_config.eos_token_id = None
    return model.to(torch.float32).eval()


def sampled(temperature: float = 1.0, n: int = 12, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=temperature, max_new_tokens=n, **more)


def key_of(completion: Completion) -> tuple[Any, ...]:
    return completion.token_ids, completion.finish_reason


def log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def full_logits(model: PreTrainedModel, prompt: tuple[int, ...], token_ids: tuple[int, ...]) -> np.ndarray:
    """Logits that each token of the completion was drawn from, by one pass without a cache: (tokens, vocabulary)."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *token_ids]]), use_cache=False).logits[0]
    return logits.double().numpy()[len(prompt) - 1 : -1]


def reference_logprobs(
    model: PreTrainedModel, prompt: tuple[int, ...], token_ids: tuple[int, ...], temperature: float
) -> np.ndarray:
    """log-softmax in float64 NumPy of the logits of one pass over prompt and completion, at the temperature."""
    logprobs = log_softmax(full_logits(model, prompt, token_ids) / (temperature or 1.0))
    return logprobs[np.arange(len(token_ids)), list(token_ids)]


def generated(model: PreTrainedModel, prompt: tuple[int, ...], **settings: Any) -> Any:
    """What transformers' own generate gives for one prompt, with logits and processed scores."""
    return model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **settings,
    )


def processed(logits: np.ndarray, seen: list[int], params: SamplingParams) -> np.ndarray:
    """Log-probabilities that are drawn from, for one row of logits, written from the definitions, in float64."""
    scores = logits.astype(np.float64).copy()
    for token, bias in params.logit_bias:
        scores[token] += bias
    for token in set(seen):
        scores[token] *= params.repetition_penalty if scores[token] < 0 else 1 / params.repetition_penalty
    scores /= params.temperature or 1.0
    if params.temperature == 0:
        return log_softmax(scores)
    if params.top_k:
        scores[scores < np.sort(scores)[::-1][min(params.top_k, len(scores)) - 1]] = -np.inf
    if params.top_p < 1:
        order = np.argsort(-scores)
        probs = np.exp(log_softmax(scores))[order]
        scores[order[probs.cumsum() - probs >= params.top_p]] = -np.inf
    if params.min_p:
        probs = np.exp(log_softmax(scores))
        scores[probs < params.min_p * probs.max()] = -np.inf
    return log_softmax(scores)


def chi_square_p_value(counts: np.ndarray, probs: np.ndarray) -> float:
    """Of counts under the probabilities; the rare tokens are taken together. 0 if something impossible was counted."""
    if counts[probs == 0].any():
        return 0.0
    n = counts.sum()
    order = np.argsort(-probs)
    split = max(1, int((probs[order] * n >= 5).sum()) - 1)
    starts = np.arange(min(split + 1, int((probs > 0).sum())))
    return float(chisquare(*(np.add.reduceat(x[order], starts) for x in (counts, n * probs))).pvalue)


def nothing_is_sampled(token_ids: list[int]) -> bool:
    raise AssertionError(f"sampled {token_ids}")


def requests_of(params: SamplingParams, **more: Any) -> list[Request]:
    """One request for each of PROMPTS, each with a key of its own."""
    return [Request(prompt_ids=prompt, params=params, key=i, **more) for i, prompt in enumerate(PROMPTS)]
