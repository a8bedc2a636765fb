"""The engine against transformers' own generate, full forward passes, and NumPy's inversion of a distribution."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel

from tinylora.adapter.attach import attach
from tinylora.adapter.config import AdapterConfig
from tinylora.errors import UserError
from tinylora.generation.prefill import common_prefix_length
from tinylora.generation.sampler import invert_cdf, sample
from tinylora.generation.transformers_backend import TransformersEngine
from tinylora.generation.types import Completion, Request, SamplingParams

MODELS = ["tiny_llama", "tiny_qwen2", "tiny_gpt2"]
PROMPTS = [
    tuple(int(x) for x in np.random.default_rng(i).integers(3, 259, size=size))
    for i, size in enumerate((1, 2, 5, 9, 17, 40))
]
CONTEXT = 128
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.getfixturevalue(request.param)


def engine(model: PreTrainedModel, **more: Any) -> TransformersEngine:
    return TransformersEngine(model, context_length=CONTEXT, **more)


def sampled(temperature: float = 1.0, n: int = 12, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=temperature, max_new_tokens=n, **more)


def reference_logprobs(model: PreTrainedModel, prompt: tuple[int, ...], completion: Completion, T: float) -> np.ndarray:
    """log-softmax in float64 NumPy of the logits of one pass over prompt and completion, at temperature T."""
    ids = [*prompt, *completion.token_ids]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy() / T
    rows = logits[len(prompt) - 1 : -1]
    shifted = rows - rows.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logprobs[np.arange(len(completion.token_ids)), list(completion.token_ids)]


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_greedy_tokens_are_those_of_transformers(model: PreTrainedModel) -> None:
    found = engine(model).generate([Request(prompt_ids=prompt, params=GREEDY) for prompt in PROMPTS])
    model.generation_config.eos_token_id = None  # the engine was given no stop token either
    for prompt, completion in zip(PROMPTS, found, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
        assert completion.token_ids == tuple(expected[0, len(prompt) :].tolist())
        assert completion.finish_reason == "length"
    assert len({completion.token_ids for completion in found}) > 1


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_logprobs_are_those_of_a_full_pass(model: PreTrainedModel, temperature: float) -> None:
    requests = [
        Request(prompt_ids=prompt, params=sampled(temperature), num_samples=2, key=i)
        for i, prompt in enumerate(PROMPTS)
    ]
    found = engine(model).generate(requests)
    assert [(c.request_index, c.sample_index) for c in found] == [(i, j) for i in range(len(PROMPTS)) for j in (0, 1)]
    for completion in found:
        expected = reference_logprobs(model, PROMPTS[completion.request_index], completion, temperature or 1.0)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-5)
        assert completion.sampling_logprobs == completion.logprobs
    if temperature == 0.7:  # and not those at temperature 1
        untempered = reference_logprobs(model, PROMPTS[0], found[0], 1.0)
        assert np.abs(np.array(found[0].logprobs) - untempered).max() > 0.01


@pytest.mark.parametrize("vocabulary", [1, 7, 256, 257, 1000])
def test_invert_cdf_is_the_inversion_of_numpy(vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    probs = rng.dirichlet(np.full(vocabulary, 0.05), size=300).astype(np.float32)
    probs[:, 1:][rng.random((300, vocabulary - 1)) < 0.3] = 0
    probs[:, 0] += np.float32(1e-3)
    uniform = rng.random(300)
    uniform[:3] = [0.0, 1 - 2**-53, 0.5]
    got = invert_cdf(torch.from_numpy(probs), torch.from_numpy(uniform)).numpy()
    cdf = probs.astype(np.float64).cumsum(-1)
    target = uniform * cdf[:, -1]
    below = np.where(got > 0, cdf[np.arange(300), np.maximum(got - 1, 0)], 0.0)
    assert (probs[np.arange(300), got] > 0).all()
    # Sums in another order differ in the last places; all but a target that close to a step are exact.
    assert (below <= target + 1e-14).all()
    assert (target < cdf[np.arange(300), got] + 1e-14).all()
    exact = [np.searchsorted(cdf[i], target[i], side="right") for i in range(300)]
    assert (got != exact).sum() <= 1


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    probs = torch.zeros(2, 600)
    probs[:, 300] = 0.5
    probs[:, 599] = 0.5
    for u in (0.0, 0.5 - 1e-17, 0.5, 1 - 2**-53):
        got = invert_cdf(probs, torch.full((2,), u, dtype=torch.float64))
        assert got.tolist() == [300 if u < 0.5 else 599] * 2


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_tokens_follow_the_distribution(tiny_llama: PreTrainedModel, temperature: float) -> None:
    prompt, n = PROMPTS[3], 6000
    with torch.no_grad():
        logits = tiny_llama(torch.tensor([prompt])).logits[0, -1].double().numpy() / temperature
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    request = Request(prompt_ids=prompt, params=sampled(temperature, 1, seed=3), num_samples=n)
    found = engine(tiny_llama, max_batch_rows=n).generate([request])
    counts = np.bincount([c.token_ids[0] for c in found], minlength=259)

    def p_value(expected: np.ndarray) -> float:
        order = np.argsort(-expected)
        split = int((expected[order] * n >= 5).sum()) - 1  # the rare tokens count as one
        starts = np.arange(split + 1)
        return float(chisquare(*(np.add.reduceat(x[order], starts) for x in (counts, n * expected))).pvalue)

    assert p_value(probs) > 1e-3
    assert p_value(probs**1.4 / (probs**1.4).sum()) < 1e-3  # as it would be at 1.4 times the temperature


def key_of(completion: Completion) -> tuple[Any, ...]:
    return completion.token_ids, completion.finish_reason


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_a_completion_does_not_depend_on_its_batch(model: PreTrainedModel) -> None:
    requests = [
        Request(prompt_ids=prompt, params=sampled(t, n, seed=5, stop_token_ids=(7, 8, 9)), num_samples=3, key=100 + i)
        for i, (prompt, t, n) in enumerate(
            zip(PROMPTS, (1.0, 0.0, 0.8, 1.0, 1.2, 0.0), (3, 9, 30, 20, 1, 15), strict=True)
        )
    ]
    together = engine(model).generate(requests)
    small = engine(model, max_batch_rows=4).generate(requests)
    alone = [completion for request in requests for completion in engine(model).generate([request])]
    assert [key_of(c) for c in together] == [key_of(c) for c in small] == [key_of(c) for c in alone]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_seed_key_and_sample_each_change_the_draw(tiny_llama: PreTrainedModel) -> None:
    def draw(seed: int, key: int) -> list[tuple[int, ...]]:
        request = Request(prompt_ids=PROMPTS[3], params=sampled(seed=seed), num_samples=2, key=key)
        return [c.token_ids for c in engine(tiny_llama).generate([request])]

    assert draw(1, 1) == draw(1, 1)
    assert len({tokens for seed, key in ((1, 1), (1, 2), (2, 1)) for tokens in draw(seed, key)}) == 6


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_a_batch_that_mixes_vectors_equals_separate_runs(model: PreTrainedModel) -> None:
    adapter = attach(model, AdapterConfig(u=2, n_tie=4))
    rng = np.random.default_rng(0)
    v, w = (torch.from_numpy(rng.normal(scale=0.3, size=(adapter.num_groups, 2))).float() for _ in range(2))
    own = torch.from_numpy(rng.normal(size=(adapter.num_groups, 2))).float()
    adapter.write(own)
    requests = [
        Request(prompt_ids=prompt, params=sampled(t), num_samples=2, key=i, v=vector)
        for i, (prompt, t, vector) in enumerate(zip(PROMPTS[2:], (1.0, 0.0, 1.0, 1.0), (None, v, w, v), strict=True))
    ]
    together = engine(model, adapter=adapter).generate(requests)
    assert torch.equal(adapter.read(), own)  # and the engine leaves the adapter as it was
    for i, request in enumerate(requests):
        with adapter.using(request.v):
            for completion in together[2 * i : 2 * i + 2]:
                T = request.params.temperature or 1.0
                expected = reference_logprobs(model, request.prompt_ids, completion, T)
                np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)
        separate = engine(model, adapter=adapter).generate([request])
        assert [key_of(c) for c in separate] == [key_of(c) for c in together[2 * i : 2 * i + 2]]
    adapter.detach()
    plain = engine(model).generate([requests[0]])
    assert [key_of(c) for c in plain] == [key_of(c) for c in together[:2]]
    changed = engine(model).generate([Request(prompt_ids=PROMPTS[4], params=sampled(), num_samples=2, key=2)])
    assert [key_of(c) for c in changed] != [key_of(c) for c in together[4:6]]


def test_a_stop_token_ends_the_row_and_is_kept(tiny_llama: PreTrainedModel) -> None:
    free = engine(tiny_llama).generate([Request(prompt_ids=PROMPTS[3], params=GREEDY)])[0]
    stop = next(token for i, token in enumerate(free.token_ids) if i >= 1 and token not in free.token_ids[:i])
    at = free.token_ids.index(stop)
    params = SamplingParams(temperature=0.0, max_new_tokens=12, stop_token_ids=(stop,))
    found = engine(tiny_llama).generate([Request(prompt_ids=PROMPTS[3], params=params)])[0]
    assert found.token_ids == free.token_ids[: at + 1]
    assert found.finish_reason == "stop"
    assert len(found.logprobs) == len(found.sampling_logprobs) == at + 1
    last = SamplingParams(temperature=0.0, max_new_tokens=at + 1, stop_token_ids=(stop,))
    assert engine(tiny_llama).generate([Request(prompt_ids=PROMPTS[3], params=last)])[0].finish_reason == "stop"


def test_should_stop_sees_the_tokens_of_its_own_row(tiny_llama: PreTrainedModel) -> None:
    seen: list[list[int]] = []

    def third(token_ids: list[int]) -> bool:
        seen.append(list(token_ids))
        return len(token_ids) == 3

    requests = [
        Request(prompt_ids=PROMPTS[2], params=GREEDY, should_stop=third),
        Request(prompt_ids=PROMPTS[3], params=GREEDY),
    ]
    short, full = engine(tiny_llama).generate(requests)
    assert short.finish_reason == "stop"
    assert seen == [list(short.token_ids[:n]) for n in (1, 2, 3)]
    assert (len(full.token_ids), full.finish_reason) == (12, "length")


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_the_context_is_a_budget(model: PreTrainedModel) -> None:
    """Rows that fill the context stay in the batch while others go on, and disturb nobody."""
    long = tuple([11, 12, 13, 14] * 31 + [15])  # 125 of 128 tokens
    filling = Request(prompt_ids=long, params=sampled(1.0, 50), key=1)
    short = Request(prompt_ids=PROMPTS[2], params=sampled(1.0, 40), num_samples=9, key=2)  # 9 of 10: nothing is dropped
    full, *others = engine(model).generate([filling, short])
    assert (len(full.token_ids), full.finish_reason) == (3, "length")
    for completion in others:
        assert len(completion.token_ids) == 40
        expected = reference_logprobs(model, PROMPTS[2], completion, 1.0)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-5)
    assert [key_of(c) for c in engine(model).generate([short])] == [key_of(c) for c in others]


def test_forced_tokens_are_taken_and_scored(tiny_llama: PreTrainedModel) -> None:
    forced = (9, 200, 3, 77)
    params = SamplingParams(temperature=0.7, max_new_tokens=6)
    found = engine(tiny_llama).generate([Request(prompt_ids=PROMPTS[3], params=params, forced_ids=forced)])[0]
    assert found.token_ids[:4] == forced
    assert len(found.token_ids) == 6
    np.testing.assert_allclose(found.logprobs, reference_logprobs(tiny_llama, PROMPTS[3], found, 0.7), atol=1e-5)


def test_samples_of_one_prompt_share_its_prefill(tiny_llama: PreTrainedModel) -> None:
    shapes: list[tuple[int, ...]] = []
    inner = tiny_llama.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return inner(*args, **kwargs)

    tiny_llama.forward = counted  # type: ignore[method-assign]
    requests = [Request(prompt_ids=prompt, params=sampled(1.0, 3), num_samples=5) for prompt in PROMPTS[2:4]]
    engine(tiny_llama).generate(requests)
    assert shapes == [(2, 9), (10, 1), (10, 1)]


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_a_prefix_that_prompts_share_changes_nothing(model: PreTrainedModel) -> None:
    adapter = attach(model, AdapterConfig(u=2, n_tie=4))
    v = torch.from_numpy(np.random.default_rng(0).normal(scale=0.3, size=(adapter.num_groups, 2))).float()
    common = PROMPTS[4]
    prompts = [common, (*common, 5), (*common, 6, 7, 8), (*common[:-1], 9), (*common, *PROMPTS[3])]
    assert common_prefix_length(prompts) == len(common) - 1
    for vectors in ([None] * 5, [v] * 5, [None, v, v, None, v]):
        requests = [
            Request(prompt_ids=prompt, params=sampled(n=6), num_samples=2, key=i, v=vector)
            for i, (prompt, vector) in enumerate(zip(prompts, vectors, strict=True))
        ]
        for completion in engine(model, adapter=adapter).generate(requests):
            request = requests[completion.request_index]
            with adapter.using(request.v):
                expected = reference_logprobs(model, request.prompt_ids, completion, 1.0)
            np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=2e-5)


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


def nothing_is_sampled(token_ids: list[int]) -> bool:
    raise AssertionError(f"sampled {token_ids}")


GOOD = Request(prompt_ids=(5, 6, 7), params=GREEDY, should_stop=nothing_is_sampled)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt_ids": ()}, "request 1 has an empty prompt"),
        ({"prompt_ids": (5,) * 128}, "request 1 has a prompt of 128 tokens and the model's context is 128"),
        ({"prompt_ids": (5, 259)}, "request 1 has token id 259; allowed: 0 to 258"),
        ({"prompt_ids": (-1, 5)}, "request 1 has token id -1"),
        ({"forced_ids": (300,)}, "request 1 has token id 300"),
        ({"num_samples": 0}, "request 1 asks for 0 samples; at least 1"),
        ({"key": -1}, "request 1 has key -1"),
        ({"v": torch.zeros(8, 1)}, r"request 1 has a vector of shape \(8, 1\); allowed: \(7, 2\)"),
        ({"v": torch.full((7, 2), float("nan"))}, "request 1 has an adapter vector with a number that is not finite"),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_sampled(
    tiny_llama: PreTrainedModel, bad: dict[str, Any], message: str
) -> None:
    adapter = attach(tiny_llama, AdapterConfig(u=2, n_tie=3))
    values = {"prompt_ids": (5, 6), "params": GREEDY, **bad}
    with pytest.raises(UserError, match=message):
        engine(tiny_llama, adapter=adapter, max_batch_rows=1).generate([GOOD, Request(**values)])


def test_a_vector_without_an_adapter_is_refused(tiny_llama: PreTrainedModel) -> None:
    request = Request(prompt_ids=(5, 6), params=GREEDY, v=torch.zeros(7, 2))
    with pytest.raises(UserError, match="request 1 brings an adapter vector but the engine has no adapter"):
        engine(tiny_llama).generate([GOOD, request])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(tiny_llama: PreTrainedModel, temperature: float, bad: float) -> None:
    with torch.no_grad():
        tiny_llama.lm_head.weight[17] = bad
    request = Request(prompt_ids=(5, 6), params=sampled(temperature), should_stop=nothing_is_sampled)
    with pytest.raises(UserError, match="non-finite logits for 1 of 1 rows"):
        engine(tiny_llama).generate([request])


def test_a_token_ruled_out_by_minus_infinity_is_fine() -> None:
    logits = torch.tensor([[0.0, -float("inf"), 0.0]])
    for u, token in ((0.49, 0), (0.5, 2)):
        tokens, logprobs = sample(logits, 1.0, torch.tensor([u], dtype=torch.float64))
        assert tokens.tolist() == [token]
        assert logprobs.tolist() == pytest.approx([-np.log(2)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number, 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"temperature": float("inf")}, "temperature must be a finite number"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_sampling_parameters_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingParams(**values)


def test_no_requests_give_no_completions_and_an_empty_batch_is_refused(tiny_llama: PreTrainedModel) -> None:
    assert engine(tiny_llama).generate([]) == []
    with pytest.raises(UserError, match="max_batch_rows must be at least 1, got 0"):
        engine(tiny_llama, max_batch_rows=0)


def test_a_model_without_position_ids_is_batched_rightly_too() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BloomForCausalLM(BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4)).eval()
    test_greedy_tokens_are_those_of_transformers(model)
