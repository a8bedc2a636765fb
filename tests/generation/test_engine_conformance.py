"""The conformance suite, the same for every engine: against transformers' own generate and full forward passes."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from engine_conformance import (
    BACKENDS,
    GREEDY,
    MODELS,
    PROMPTS,
    VOCABULARY,
    chi_square_p_value,
    full_logits,
    generated,
    key_of,
    make_engine,
    nothing_is_sampled,
    processed,
    reference_logprobs,
    requests_of,
    sampled,
    tiny,
)
from transformers import DynamicCache

from tinylora.adapter.attach import AttachedAdapter, attach
from tinylora.adapter.config import AdapterConfig
from tinylora.errors import UserError
from tinylora.generation.sequences import GenerationError
from tinylora.generation.types import Request, SamplingParams
from tinylora.models.prefill import with_cache

NEAR_TIE = 1e-3
"""Logits closer than this are in an order that batching may change in float32."""

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
every_model = pytest.mark.parametrize("name", MODELS)


def random_vectors(adapter: AttachedAdapter, count: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    return [
        torch.from_numpy(rng.normal(scale=0.3, size=(adapter.num_groups, adapter.config.u))).float()
        for _ in range(count)
    ]


@every_model
def test_greedy_tokens_are_those_of_transformers(backend: str, name: str) -> None:
    model = tiny(name)
    expected = [generated(model, prompt, max_new_tokens=24, do_sample=False) for prompt in PROMPTS]
    found = make_engine(backend, model).generate(requests_of(sampled(0.0, 24)))
    near_ties = 0
    for prompt, reference, completion in zip(PROMPTS, expected, found, strict=True):
        wanted = tuple(reference.sequences[0, len(prompt) :].tolist())
        assert len(completion.token_ids) == len(wanted)
        assert completion.finish_reason == "length"
        for step, (token, want) in enumerate(zip(completion.token_ids, wanted, strict=True)):
            if token != want:
                top = reference.logits[step][0].topk(2).values
                assert float(top[0] - top[1]) < NEAR_TIE, f"position {step}: {token} is not {want}"
                near_ties += 1
                break
    assert near_ties == 0
    assert len({completion.token_ids for completion in found}) > 1


@every_model
def test_logprobs_are_those_of_a_full_pass(backend: str, name: str) -> None:
    model = tiny(name)
    temperatures = (0.0, 0.7, 1.0)
    requests = [request for T in temperatures for request in requests_of(sampled(T), num_samples=2)]
    found = make_engine(backend, model).generate(requests)
    assert [(c.request_index, c.sample_index) for c in found] == [(i, j) for i in range(len(requests)) for j in (0, 1)]
    for completion in found:
        request = requests[completion.request_index]
        T = request.params.temperature
        expected = reference_logprobs(model, request.prompt_ids, completion.token_ids, T)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-5)
        assert completion.sampling_logprobs == completion.logprobs
        if T == 0.7:  # and not those at temperature 1
            untempered = reference_logprobs(model, request.prompt_ids, completion.token_ids, 1.0)
            assert np.abs(np.array(completion.logprobs) - untempered).max() > 0.01


LONGER = PROMPTS * 4
"""Every prompt with four continuations: a mean over few tokens hangs on one of them."""


@cache
def bfloat16_reference(name: str) -> tuple[list[tuple[int, ...]], np.ndarray, np.ndarray]:
    """Random tokens; their log-probs in bfloat16 by transformers' cached decode, and by one pass in float32."""
    model = tiny(name).to(torch.bfloat16)
    rng = np.random.default_rng(0)
    tokens = [tuple(rng.integers(3, VOCABULARY, 24).tolist()) for _ in LONGER]
    decoded = []
    for prompt, ids in zip(LONGER, tokens, strict=True):
        cache, given, rows = DynamicCache(config=model.config), torch.tensor([prompt]), []
        for token in ids:
            with torch.no_grad():
                rows.append(model(given, **with_cache(model, cache)).logits[0, -1].float().log_softmax(-1)[token])
            given = torch.tensor([[token]])
        decoded.append(torch.stack(rows).numpy())
    model.float()
    exact = [reference_logprobs(model, prompt, ids, 1.0) for prompt, ids in zip(LONGER, tokens, strict=True)]
    return tokens, np.concatenate(decoded), np.concatenate(exact)


@every_model
def test_bfloat16_is_as_close_to_float32_as_transformers_cached_decode(backend: str, name: str) -> None:
    """How far two bfloat16 computations are apart is the processor's affair: where transformers' decode and its full
    pass go through one kernel of torch's they agree to 1e-7, elsewhere to 1e-2. How far each is from float32 is not:
    on every instruction set tried, ours is 0.95 to 1.04 times as far as theirs."""
    tokens, decoded, exact = bfloat16_reference(name)
    requests = [
        Request(prompt_ids=prompt, params=sampled(1.0, 24), forced_ids=forced)
        for prompt, forced in zip(LONGER, tokens, strict=True)
    ]
    found = make_engine(backend, tiny(name).to(torch.bfloat16)).generate(requests)
    ours = np.concatenate([completion.logprobs for completion in found])
    error, their_error = np.abs(ours - exact).mean(), np.abs(decoded - exact).mean()
    print(f"{name}: mean error to float32 {error:.2e}, of transformers' cached decode {their_error:.2e}")
    assert 0 < error <= 1.2 * their_error


@every_model
def test_a_completion_does_not_depend_on_its_batch(backend: str, name: str) -> None:
    model = tiny(name)
    more: tuple[dict[str, Any], ...] = (
        {},
        {},
        {"top_k": 20, "top_p": 0.8},
        {},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
    )
    requests = [
        Request(
            prompt_ids=prompt, params=sampled(t, n, seed=5, stop_token_ids=(7, 8, 9), **kw), num_samples=3, key=100 + i
        )
        for i, (prompt, t, n, kw) in enumerate(
            zip(PROMPTS, (1.0, 0.0, 0.8, 1.0, 1.2, 0.0), (3, 9, 20, 14, 1, 12), more, strict=True)
        )
    ]
    together = make_engine(backend, model).generate(requests)
    small = make_engine(backend, model, max_batch_rows=4).generate(requests)
    backwards = make_engine(backend, model).generate(requests[::-1])
    alone = [completion for request in requests for completion in make_engine(backend, model).generate([request])]
    backwards.sort(key=lambda c: (-c.request_index, c.sample_index))
    assert [key_of(c) for c in together] == [key_of(c) for c in small] == [key_of(c) for c in alone]
    assert [key_of(c) for c in together] == [key_of(c) for c in backwards]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        np.testing.assert_allclose(a.sampling_logprobs, b.sampling_logprobs, atol=1e-5)


def test_seed_key_and_sample_each_change_the_draw(backend: str) -> None:
    model = tiny("llama")

    def draw(seed: int, key: int) -> list[tuple[int, ...]]:
        request = Request(prompt_ids=PROMPTS[3], params=sampled(seed=seed), num_samples=2, key=key)
        return [c.token_ids for c in make_engine(backend, model).generate([request])]

    assert draw(1, 1) == draw(1, 1)
    assert len({tokens for seed, key in ((1, 1), (1, 2), (2, 1)) for tokens in draw(seed, key)}) == 6


@every_model
def test_a_batch_that_mixes_vectors_equals_separate_runs(backend: str, name: str) -> None:
    model = tiny(name)
    adapter = attach(model, AdapterConfig(u=2, n_tie=4))
    v, w, own = random_vectors(adapter, 3)
    adapter.write(own)
    requests = [
        Request(prompt_ids=prompt, params=sampled(t), num_samples=2, key=i, v=vector)
        for i, (prompt, t, vector) in enumerate(zip(PROMPTS[2:], (1.0, 0.0, 1.0, 1.0), (None, v, w, v), strict=True))
    ]
    together = make_engine(backend, model, adapter=adapter).generate(requests)
    assert torch.equal(adapter.read(), own)  # and the engine leaves the adapter as it was
    for i, request in enumerate(requests):
        pair = together[2 * i : 2 * i + 2]
        with adapter.using(request.v):
            for completion in pair:
                expected = reference_logprobs(
                    model, request.prompt_ids, completion.token_ids, request.params.temperature
                )
                np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)
        separate = make_engine(backend, model, adapter=adapter).generate([request])
        assert [key_of(c) for c in separate] == [key_of(c) for c in pair]
    adapter.detach()
    plain = make_engine(backend, model).generate([requests[0]])
    assert [key_of(c) for c in plain] == [key_of(c) for c in together[:2]]
    changed = make_engine(backend, model).generate(
        [Request(prompt_ids=PROMPTS[4], params=sampled(), num_samples=2, key=2)]
    )
    assert [key_of(c) for c in changed] != [key_of(c) for c in together[4:6]]


def test_one_engine_takes_a_new_vector_at_every_call(backend: str) -> None:
    model = tiny("qwen2")
    adapter = attach(model, AdapterConfig(u=2, n_tie=4))
    engine = make_engine(backend, model, adapter=adapter)
    vectors = [*random_vectors(adapter, 2), None]
    for v in (*vectors, vectors[0]):
        (completion,) = engine.generate([Request(prompt_ids=PROMPTS[3], params=sampled(), v=v)])
        with adapter.using(v):
            expected = reference_logprobs(model, PROMPTS[3], completion.token_ids, 1.0)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=2e-5)


def test_a_stop_token_ends_the_row_and_is_kept(backend: str) -> None:
    engine = make_engine(backend, tiny("llama"))
    free = engine.generate([Request(prompt_ids=PROMPTS[3], params=GREEDY)])[0]
    stop = next(token for i, token in enumerate(free.token_ids) if i >= 1 and token not in free.token_ids[:i])
    at = free.token_ids.index(stop)
    params = SamplingParams(temperature=0.0, max_new_tokens=12, stop_token_ids=(stop,))
    found = engine.generate([Request(prompt_ids=PROMPTS[3], params=params)])[0]
    assert found.token_ids == free.token_ids[: at + 1]
    assert found.finish_reason == "stop"
    assert len(found.logprobs) == len(found.sampling_logprobs) == at + 1
    last = SamplingParams(temperature=0.0, max_new_tokens=at + 1, stop_token_ids=(stop,))
    assert engine.generate([Request(prompt_ids=PROMPTS[3], params=last)])[0].finish_reason == "stop"


def test_should_stop_sees_the_tokens_of_its_own_row(backend: str) -> None:
    seen: list[list[int]] = []

    def third(token_ids: list[int]) -> bool:
        seen.append(list(token_ids))
        return len(token_ids) == 3

    requests = [
        Request(prompt_ids=PROMPTS[2], params=GREEDY, should_stop=third),
        Request(prompt_ids=PROMPTS[3], params=GREEDY),
    ]
    short, full = make_engine(backend, tiny("llama")).generate(requests)
    assert short.finish_reason == "stop"
    assert seen == [list(short.token_ids[:n]) for n in (1, 2, 3)]
    assert (len(full.token_ids), full.finish_reason) == (12, "length")


@every_model
def test_the_context_is_a_budget(backend: str, name: str) -> None:
    """Rows that fill the context end there, and disturb nobody."""
    model = tiny(name)
    long = tuple([11, 12, 13, 14] * 31 + [15])  # 125 of 128 tokens
    filling = Request(prompt_ids=long, params=sampled(1.0, 50), key=1)
    short = Request(prompt_ids=PROMPTS[2], params=sampled(1.0, 40), num_samples=9, key=2)
    full, *others = make_engine(backend, model).generate([filling, short])
    assert (len(full.token_ids), full.finish_reason) == (3, "length")
    np.testing.assert_allclose(full.logprobs, reference_logprobs(model, long, full.token_ids, 1.0), rtol=0, atol=1e-5)
    for completion in others:
        assert len(completion.token_ids) == 40
        expected = reference_logprobs(model, PROMPTS[2], completion.token_ids, 1.0)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-5)
    alone = make_engine(backend, model).generate([short])
    assert [key_of(c) for c in alone] == [key_of(c) for c in others]


@pytest.mark.parametrize("more", [{}, {"top_k": 3}, {"repetition_penalty": 2.0, "logit_bias": ((9, 4.0),)}])
def test_forced_tokens_are_taken_and_scored(backend: str, more: dict[str, Any]) -> None:
    model = tiny("llama")
    forced = (9, 200, 3, 77)
    params = sampled(0.7, 6, **more)
    (found,) = make_engine(backend, model).generate([Request(prompt_ids=PROMPTS[3], params=params, forced_ids=forced)])
    assert found.token_ids[:4] == forced
    assert len(found.token_ids) == 6
    expected = reference_logprobs(model, PROMPTS[3], found.token_ids, 0.7)
    np.testing.assert_allclose(found.logprobs, expected, rtol=0, atol=1e-5)
    logits = full_logits(model, PROMPTS[3], found.token_ids)
    for i, token in enumerate(found.token_ids):  # a forced token that the sampler rules out has -inf
        want = processed(logits[i], [*PROMPTS[3], *found.token_ids[:i]], params)[token]
        np.testing.assert_allclose(found.sampling_logprobs[i], want, rtol=0, atol=1e-5)
    assert np.isfinite(found.logprobs).all()
    assert (-np.inf in found.sampling_logprobs) == ("top_k" in more)


@every_model
def test_a_prefix_that_prompts_share_changes_nothing(backend: str, name: str) -> None:
    model = tiny(name)
    adapter = attach(model, AdapterConfig(u=2, n_tie=4))
    (v,) = random_vectors(adapter, 1)
    common = PROMPTS[4]
    prompts = [common, (*common, 5), (*common, 6, 7, 8), (*common[:-1], 9), (*common, *PROMPTS[3]), common]
    for vectors in ([None] * 6, [v] * 6, [None, v, v, None, v, v]):
        requests = [
            Request(prompt_ids=prompt, params=sampled(n=6), num_samples=2, key=i, v=vector)
            for i, (prompt, vector) in enumerate(zip(prompts, vectors, strict=True))
        ]
        for completion in make_engine(backend, model, adapter=adapter).generate(requests):
            request = requests[completion.request_index]
            with adapter.using(request.v):
                expected = reference_logprobs(model, request.prompt_ids, completion.token_ids, 1.0)
            np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=2e-5)


# Samplers

SAMPLERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.6},
    {"min_p": 0.1},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.7},
    {"logit_bias": ((3, -5.0), (20, 3.0), (258, 1.5))},
    {
        "temperature": 1.3,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "logit_bias": ((20, 3.0),),
    },
]
every_sampler = pytest.mark.parametrize("more", SAMPLERS, ids=lambda more: "+".join(more) or "none")


@every_sampler
def test_sampled_tokens_follow_the_processed_distribution(backend: str, more: dict[str, Any]) -> None:
    model = tiny("llama")
    prompt, n = PROMPTS[3], 3000
    params = SamplingParams(max_new_tokens=1, seed=3, **more)
    logits = full_logits(model, prompt, (0,))[0]
    probs = np.exp(processed(logits, list(prompt), params))
    request = Request(prompt_ids=prompt, params=params, num_samples=n)
    found = make_engine(backend, model, max_batch_rows=n).generate([request])
    counts = np.bincount([c.token_ids[0] for c in found], minlength=VOCABULARY)
    assert chi_square_p_value(counts, probs) > 1e-3
    other = processed(logits, list(prompt), SamplingParams(temperature=1.4 * params.temperature))
    assert chi_square_p_value(counts, np.exp(other)) < 1e-3


@every_sampler
def test_both_logprobs_are_those_of_their_distributions(backend: str, more: dict[str, Any]) -> None:
    model = tiny("llama")
    params = SamplingParams(max_new_tokens=12, seed=3, **more)
    requests = requests_of(params, num_samples=2)
    for completion in make_engine(backend, model).generate(requests):
        prompt, ids = requests[completion.request_index].prompt_ids, completion.token_ids
        logits = full_logits(model, prompt, ids)
        expected = [processed(logits[i], [*prompt, *ids[:i]], params)[ids[i]] for i in range(len(ids))]
        # The 1e-5 of a full pass is held above. One of these texts comes to a place where float32 is ill-conditioned:
        # transformers' own cached decode is off by 8e-6 there, ours by 2e-5.
        np.testing.assert_allclose(completion.sampling_logprobs, expected, rtol=0, atol=3e-5)
        expected = reference_logprobs(model, prompt, ids, params.temperature)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=3e-5)


@every_sampler
def test_sampling_logprobs_are_those_of_transformers_processors(backend: str, more: dict[str, Any]) -> None:
    """What transformers' generate samples is forced on the engine: the same scores, so the same order of processors."""
    model = tiny("llama")
    theirs = {"top_k": 0, "do_sample": True, "max_new_tokens": 12, **more}
    if "logit_bias" in theirs:
        theirs["sequence_bias"] = {(token,): bias for token, bias in theirs.pop("logit_bias")}
    requests, expected = [], []
    for prompt in PROMPTS[2:]:
        torch.manual_seed(0)
        reference = generated(model, prompt, **theirs)
        ids = tuple(reference.sequences[0, len(prompt) :].tolist())
        logprobs = torch.stack(reference.scores, 1)[0].log_softmax(-1)
        expected.append(logprobs[torch.arange(12), list(ids)].numpy())
        params = SamplingParams(max_new_tokens=12, **more)
        requests.append(Request(prompt_ids=prompt, params=params, forced_ids=ids))
    for completion, want in zip(make_engine(backend, model).generate(requests), expected, strict=True):
        np.testing.assert_allclose(completion.sampling_logprobs, want, rtol=0, atol=1e-5)


def test_greedy_takes_penalty_and_bias_into_account_as_transformers_does(backend: str) -> None:
    model = tiny("llama")
    theirs = {"repetition_penalty": 1.6, "sequence_bias": {(20,): 3.0}}
    params = SamplingParams(
        temperature=0.0, max_new_tokens=12, repetition_penalty=1.6, logit_bias=((20, 3.0),), top_k=3
    )
    found = make_engine(backend, model).generate(requests_of(params))
    plain = make_engine(backend, model).generate(requests_of(GREEDY))
    for prompt, completion in zip(PROMPTS, found, strict=True):
        reference = generated(model, prompt, do_sample=False, max_new_tokens=12, **theirs)
        assert completion.token_ids == tuple(reference.sequences[0, len(prompt) :].tolist())
        np.testing.assert_allclose(
            completion.logprobs, reference_logprobs(model, prompt, completion.token_ids, 0.0), rtol=0, atol=1e-5
        )
    assert [c.token_ids for c in found] != [c.token_ids for c in plain]


def test_who_watches_is_told_of_each_completion_as_it_ends(backend: str) -> None:
    model = tiny("llama")
    seen: list[str] = []

    def look(token_ids: list[int]) -> bool:
        seen.append("token")
        return False

    requests = [
        Request(
            prompt_ids=PROMPTS[i], params=sampled(n=3 + 3 * i), num_samples=i + 1, key=i, should_stop=look,
            on_finished=lambda i=i: seen.append(f"end of {i}"),  # type: ignore[misc]
        )
        for i in range(3)
    ]  # fmt: skip
    found = make_engine(backend, model, max_batch_rows=2).generate(requests)
    ends = [one for one in seen if one != "token"]
    assert sorted(ends) == [f"end of {one.request_index}" for one in found]
    assert seen.count("token") == sum(len(one.token_ids) for one in found) == 3 + 2 * 6 + 3 * 9
    assert seen[-1] == ends[-1] and "token" in seen[seen.index(ends[0]) :]  # one by one, not all at the end


# Bad input

GOOD = Request(prompt_ids=(5, 6, 7), params=GREEDY, should_stop=nothing_is_sampled)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt_ids": ()}, "request 1 has an empty prompt"),
        ({"prompt_ids": [5, 6]}, "request 1 has prompt_ids of type list"),
        ({"forced_ids": None}, "request 1 has forced_ids of type NoneType"),
        ({"should_stop": 5}, "request 1 has a should_stop of type int"),
        ({"on_finished": 5}, "request 1 has an on_finished of type int"),
        ({"prompt_ids": (5,) * 128}, "request 1 has a prompt of 128 tokens and the model's context is 128"),
        ({"prompt_ids": (5,) * 500}, "request 1 has a prompt of 500 tokens and the model's context is 128"),
        ({"prompt_ids": (5, 259)}, "request 1 has token id 259; allowed: 0 to 258"),
        ({"prompt_ids": (-1, 5)}, "request 1 has token id -1"),
        ({"prompt_ids": (5, 6.5)}, "request 1 has token id 6.5"),
        ({"forced_ids": (300,)}, "request 1 has token id 300"),
        ({"params": SamplingParams(logit_bias=((259, 1.0),))}, "request 1 has token id 259"),
        ({"params": None}, "request 1 has params of type NoneType; give SamplingParams"),
        ({"num_samples": 0}, "request 1 asks for 0 samples; at least 1"),
        ({"num_samples": -3}, "request 1 asks for -3 samples; at least 1"),
        ({"num_samples": "2"}, "request 1 asks for 2 samples"),
        ({"key": -1}, "request 1 has key -1"),
        ({"key": 2**64}, f"request 1 has key {2**64}"),
        ({"v": torch.zeros(8, 1)}, r"request 1 has a vector of shape \(8, 1\); allowed: \(7, 2\)"),
        ({"v": [0.0]}, "request 1 has a vector of type list"),
        ({"v": torch.full((7, 2), float("nan"))}, "request 1 has an adapter vector with a number that is not finite"),
        ({"v": torch.full((7, 2), float("inf"))}, "request 1 has an adapter vector with a number that is not finite"),
    ],
    ids=str,
)
def test_a_bad_request_is_refused_before_anything_is_sampled(backend: str, bad: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    adapter = attach(model, AdapterConfig(u=2, n_tie=3))
    values = {"prompt_ids": (5, 6), "params": GREEDY, **bad}
    with pytest.raises(UserError, match=message):
        make_engine(backend, model, adapter=adapter, max_batch_rows=1).generate([GOOD, Request(**values)])


def test_a_vector_without_an_adapter_is_refused(backend: str) -> None:
    request = Request(prompt_ids=(5, 6), params=GREEDY, v=torch.zeros(7, 2))
    with pytest.raises(UserError, match="request 1 brings an adapter vector but the engine has no adapter"):
        make_engine(backend, tiny("llama")).generate([GOOD, request])


@pytest.mark.parametrize("more", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.5, "min_p": 0.1, "top_k": 9}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(backend: str, more: dict[str, Any], bad: float) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[17] = bad
    request = Request(prompt_ids=(5, 6), params=SamplingParams(**more), should_stop=nothing_is_sampled)
    with pytest.raises(
        GenerationError, match="^request 0: the model gave non-finite logits for token 0 of sample 0; try"
    ):
        make_engine(backend, model).generate([request])


@every_model
def test_a_request_whose_logits_overflow_does_not_harm_the_others(backend: str, name: str) -> None:
    model = tiny(name)
    adapter = attach(model, AdapterConfig(u=2, n_tie=4))
    (v,) = random_vectors(adapter, 1)
    huge = torch.full_like(v, 3e38)
    good = [
        Request(prompt_ids=prompt, params=sampled(1.0, n), num_samples=2, key=i, v=vector)
        for i, (prompt, n, vector) in enumerate(zip(PROMPTS[1:5], (4, 12, 9, 12), (v, None, v, None), strict=True))
    ]
    bad = [
        Request(prompt_ids=PROMPTS[3], params=sampled(), num_samples=2, v=huge, should_stop=nothing_is_sampled),
        Request(prompt_ids=PROMPTS[1], params=GREEDY, v=huge, should_stop=nothing_is_sampled),
    ]
    engine = make_engine(backend, model, adapter=adapter)
    expected = engine.generate(good)
    with pytest.raises(GenerationError) as caught:
        engine.generate([good[0], bad[0], *good[1:3], bad[1], good[3]])
    assert str(caught.value).startswith(
        "request 1 (the first of 2 requests that failed): the model gave non-finite logits for token 0 of sample 0; try"
    )
    found = caught.value.completions
    assert [(c.request_index, c.sample_index) for c in found] == [(i, j) for i in (0, 2, 3, 5) for j in (0, 1)]
    assert [key_of(c) for c in found] == [key_of(c) for c in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)
    again = engine.generate(good)  # and the engine is as good as before
    assert [key_of(c) for c in again] == [key_of(c) for c in expected]


def test_no_requests_give_no_completions_and_an_empty_batch_is_refused(backend: str) -> None:
    model = tiny("llama")
    assert make_engine(backend, model).generate([]) == []
    with pytest.raises(UserError, match="max_batch_rows must be at least 1, got 0"):
        make_engine(backend, model, max_batch_rows=0)
