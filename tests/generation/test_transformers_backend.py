"""What only the transformers backend does: models of any architecture, padded batches, shared prefixes."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engine_conformance import (
    CONTEXT,
    GREEDY,
    OTHER_MODELS,
    PROMPTS,
    generated,
    key_of,
    reference_logprobs,
    requests_of,
    sampled,
    tiny,
)

from tinylora.adapter.attach import attach
from tinylora.adapter.config import AdapterConfig
from tinylora.errors import UserError
from tinylora.generation.transformers_backend import TransformersEngine
from tinylora.generation.types import Request
from tinylora.learner.learner import Learner, Row
from tinylora.models.prefill import common_prefix_length


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_architectures_are_batched_rightly_too(name: str) -> None:
    model = tiny(name)
    engine = TransformersEngine(model, context_length=CONTEXT)
    for prompt, completion in zip(PROMPTS, engine.generate(requests_of(GREEDY)), strict=True):
        expected = generated(model, prompt, max_new_tokens=12, do_sample=False)
        assert completion.token_ids == tuple(expected.sequences[0, len(prompt) :].tolist())
        logprobs = reference_logprobs(model, prompt, completion.token_ids, 1.0)
        np.testing.assert_allclose(completion.logprobs, logprobs, rtol=0, atol=1e-5)


def test_samples_of_one_prompt_share_its_prefill() -> None:
    shapes: list[tuple[int, ...]] = []
    model = tiny("llama")
    inner = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return inner(*args, **kwargs)

    model.forward = counted  # type: ignore[method-assign]
    requests = [Request(prompt_ids=prompt, params=sampled(1.0, 3), num_samples=5) for prompt in PROMPTS[2:4]]
    TransformersEngine(model, context_length=CONTEXT).generate(requests)
    assert shapes == [(2, 9), (10, 1), (10, 1)]


def test_a_row_that_fills_the_context_may_stay_in_the_batch() -> None:
    """9 of 10 rows still run, so that nothing is dropped: the finished one is decoded on, past the context's end."""
    model = tiny("gpt2")  # whose table of positions ends there
    long = tuple([11, 12, 13, 14] * 31 + [15])  # 125 of 128 tokens
    filling = Request(prompt_ids=long, params=sampled(1.0, 50), key=1)
    short = Request(prompt_ids=PROMPTS[2], params=sampled(1.0, 40), num_samples=9, key=2)
    engine = TransformersEngine(model, context_length=CONTEXT)
    full, *others = engine.generate([filling, short])
    assert (len(full.token_ids), full.finish_reason) == (3, "length")
    assert [key_of(c) for c in engine.generate([short])] == [key_of(c) for c in others]


@pytest.mark.parametrize(("name", "shared"), [("llama", True), ("mistral", False), ("gemma3", False)])
def test_a_prefix_is_not_shared_where_a_window_would_count_the_padding_behind_it(name: str, shared: bool) -> None:
    """Bug met here: behind a shared prefix short rows are padded in the middle, and a sliding window lost tokens."""
    widths: list[int] = []
    model = tiny(name)
    inner = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        widths.append(kwargs["input_ids"].shape[1])
        return inner(*args, **kwargs)

    model.forward = counted  # type: ignore[method-assign]
    prompts = [PROMPTS[4], (*PROMPTS[4], 6, 7, 8)]
    requests = [Request(prompt_ids=prompt, params=sampled(n=1)) for prompt in prompts]
    TransformersEngine(model, context_length=CONTEXT).generate(requests)
    assert widths == ([16, 4] if shared else [20])


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        ([(1, 2, 3)], 2),
        ([(1, 2, 3), (1, 2, 3)], 2),
        ([(1, 2), (1, 2, 3)], 1),
        ([(4,), (4, 5)], 0),
        ([(1, 2), (2, 2)], 0),
    ],
)
def test_common_prefix_leaves_each_prompt_a_token(prompts: list[tuple[int, ...]], length: int) -> None:
    assert common_prefix_length(prompts) == length


@pytest.mark.parametrize("kind", ["mistral", "gpt_neo", "mpt"])
def test_shared_prefixes_give_the_log_probs_of_full_forwards(kind: str) -> None:
    """Bugs met here: windows, local attention and ALiBi measure distance by place in the cache, padding included."""
    model = tiny("mistral") if kind == "mistral" else _other(kind)
    head = PROMPTS[4][:9]
    prompts = [(*head, 5, 6), (*head, 7, 8, 9, 10, 11, 12), (*head, 3)]
    rows = [Row(i, prompt, (4, 9, 2)) for i, prompt in enumerate(prompts)]
    requests = [Request(prompt_ids=p, params=GREEDY, forced_ids=(4, 9, 2)) for p in prompts]
    found = TransformersEngine(model, context_length=CONTEXT).generate(requests)
    adapter = attach(model, AdapterConfig(targets=("all-linear",)))
    scored, _ = Learner(model, adapter, packed=False).logprobs(rows, None)
    adapter.detach()
    for completion, got, prompt in zip(found, scored, prompts, strict=True):
        expected = reference_logprobs(model, prompt, (4, 9, 2), 1.0)
        np.testing.assert_allclose(completion.logprobs[:3], expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(got.detach().numpy(), expected, rtol=0, atol=1e-5)


def _other(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "mpt":
            config = transformers.MptConfig(vocab_size=259, d_model=32, n_heads=4, n_layers=2, max_seq_len=64)
            model: Any = transformers.MptForCausalLM(config)
        else:
            config = transformers.GPTNeoConfig(
                vocab_size=259, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64, window_size=6,
                attention_types=[[["local", "global"], 1]],
            )  # fmt: skip
            model = transformers.GPTNeoForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.3)
    model.generation_config.eos_token_id = None
    return model.eval()


def test_a_recurrent_state_is_refused_in_one_sentence() -> None:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(UserError, match="MambaForCausalLM keeps a recurrent state"):
        TransformersEngine(transformers.MambaForCausalLM(config), context_length=32)
