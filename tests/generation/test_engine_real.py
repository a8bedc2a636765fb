"""The engines on the real embedded model: greedy tokens are those of transformers, near-ties aside."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from engine_conformance import BACKENDS, make_engine
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tinylora.generation.types import Request, SamplingParams
from tinylora.models.base import BaseModel
from tinylora.models.prefill import with_cache

pytestmark = pytest.mark.model

NEW_TOKENS = 12
NEAR_TIE = 1e-3
"""Logits closer than this are in an order that batching and padding may change in float32."""
TEXTS = [
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):",
    "1 2 3 4 5",
    "Once upon a time, in a small village by the sea,",
    "Q: What is 17 + 25?\nA:",
    "She opened the old wooden door and",
    "A",
    "import numpy as np\n\nx =",
]
QUESTIONS = [
    "What is 7 + 8?",
    "Name a fruit that is yellow.",
    "Is 91 a prime number? Explain briefly.",
    "How many legs does a spider have?",
]


@pytest.fixture(scope="module")
def prompts(smollm2: BaseModel) -> list[tuple[int, ...]]:
    tokenizer = smollm2.tokenizer
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in QUESTIONS
    ]
    return [tuple(tokenizer(text).input_ids) for text in TEXTS + chats]


@pytest.fixture(scope="module")
def references(smollm2: BaseModel, prompts: list[tuple[int, ...]]) -> list[Any]:
    """What transformers generates for each prompt, with its logits."""
    return [
        smollm2.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=list(smollm2.stop_token_ids),
            pad_token_id=smollm2.pad_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for prompt in prompts
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_tokens_are_those_of_transformers_but_for_near_ties(
    smollm2: BaseModel, prompts: list[tuple[int, ...]], references: list[Any], backend: str
) -> None:
    assert len(prompts) == 13
    engine = make_engine(backend, smollm2.model, context_length=smollm2.context_length)
    params = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS, stop_token_ids=smollm2.stop_token_ids)
    found = engine.generate([Request(prompt_ids=prompt, params=params) for prompt in prompts])

    compared, near_ties = 0, 0
    for prompt, completion, reference in zip(prompts, found, references, strict=True):
        expected = reference.sequences[0, len(prompt) :].tolist()
        for step, (token, want) in enumerate(zip(completion.token_ids, expected, strict=False)):
            logits = reference.logits[step][0]
            top = logits.topk(2).values
            if token != want:
                assert float(top[0] - top[1]) < NEAR_TIE, f"prompt {prompt}, position {step}: {token} is not {want}"
                near_ties += 1
                break  # from here on the texts differ
            compared += 1
            assert completion.logprobs[step] == pytest.approx(float(logits.log_softmax(-1)[want]), abs=1e-3)
        else:
            assert len(completion.token_ids) == len(expected)
    print(f"{compared} tokens equal, {near_ties} near-ties")
    assert near_ties <= 1
    assert compared >= 120  # some answers stop early


@dataclass(frozen=True)
class Rounded:
    """The model in bfloat16, fixed tokens after some prompts, and their log-probs by transformers."""

    model: PreTrainedModel
    prompts: list[tuple[int, ...]]
    fixed: tuple[int, ...]
    exact: Tensor
    """Of a pass over all tokens at once in float32, (prompts, tokens)."""
    cached: Tensor
    """In bfloat16, token by token with a cache, (prompts, tokens)."""


@pytest.fixture(scope="module")
def rounded(smollm2: BaseModel) -> Rounded:
    model = copy.deepcopy(smollm2.model).to(torch.bfloat16)
    prompts = [tuple(smollm2.tokenizer(text).input_ids) for text in TEXTS]
    fixed = tuple(smollm2.tokenizer(" the answer is that nobody knows, but many people have asked for it").input_ids)
    exact, cached = [], []
    with torch.no_grad():
        for prompt in prompts:
            logits = smollm2.model(torch.tensor([[*prompt, *fixed]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            exact.append(logits.double().log_softmax(-1).gather(1, torch.tensor(fixed).unsqueeze(1)).squeeze(1))
            cache, given, rows = DynamicCache(config=model.config), torch.tensor([prompt]), []
            for token in fixed:
                rows.append(model(given, **with_cache(model, cache)).logits[0, -1].double().log_softmax(-1)[token])
                given = torch.tensor([[token]])
            cached.append(torch.stack(rows))
    return Rounded(model, prompts, fixed, torch.stack(exact), torch.stack(cached))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_as_close_to_float32_as_transformers_cached_decode(
    smollm2: BaseModel, rounded: Rounded, backend: str
) -> None:
    """Log-probs of fixed tokens; rounding makes every order of sums another one (more: bench/speed/exactness.py)."""
    params = SamplingParams(max_new_tokens=len(rounded.fixed))
    requests = [Request(prompt_ids=prompt, params=params, forced_ids=rounded.fixed) for prompt in rounded.prompts]
    found = make_engine(backend, rounded.model, context_length=smollm2.context_length).generate(requests)
    ours = torch.tensor([completion.logprobs for completion in found], dtype=torch.float64)
    error, their_error = (float((x - rounded.exact).abs().mean()) for x in (ours, rounded.cached))
    print(f"mean error to float32 {error:.3e}, of transformers' cached decode {their_error:.3e}")
    assert 0 < error <= 1.3 * their_error
