"""Drawing from given logits: the draw against NumPy's, the processors against transformers' own, bad settings."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from engine_conformance import log_softmax, processed
from torch import Tensor

from tinylora.errors import UserError
from tinylora.generation.noise import draw_state, gumbel_noise
from tinylora.generation.sampler import BLOCK, draw_tokens
from tinylora.generation.sequences import GenerationError, Sequence, collect, make_sequences
from tinylora.generation.types import Request, SamplingParams


def sequences(rows: int, prompt: tuple[int, ...] = (1, 2), key: int = 0, **params: Any) -> list[Sequence]:
    request = Request(prompt_ids=prompt, params=SamplingParams(**params), num_samples=rows, key=key)
    return make_sequences([request])


def drawn_by_numpy(logprobs: np.ndarray, seed: int, key: int, position: int = 0) -> list[int]:
    """Two steps of Gumbel-max in float64: a block of 256 tokens by its sum, then a token in it."""
    rows, vocabulary = logprobs.shape
    padded = np.pad(logprobs, ((0, 0), (0, -vocabulary % BLOCK)), constant_values=-np.inf).reshape(rows, -1, BLOCK)
    state = draw_state(seed, key, np.arange(rows), position)
    with np.errstate(divide="ignore"):
        block = (np.log(np.exp(padded).sum(-1)) + gumbel_noise(state, 0, padded.shape[1])).argmax(-1)
    token = (padded[np.arange(rows), block] + gumbel_noise(state, 1 + block, BLOCK)).argmax(-1)
    return (block * BLOCK + token).tolist()


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((400, 600), -torch.inf)
    logits[:, 300] = 0.0
    logits[:, 599] = 0.0
    drawn = draw_tokens(logits, sequences(400))
    assert set(drawn.token_ids) == {300, 599}
    assert 120 < drawn.token_ids.count(300) < 280  # a fair coin


def test_rounding_changes_few_draws() -> None:
    """Noise on the logits changes a token about as often as it changes the distribution; by inverting the cumulative
    sum in the order of the vocabulary, half of these tokens would change."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(scale=3.0, size=(600, 49152))).float()
    moved = logits + torch.from_numpy(rng.normal(scale=0.02, size=(600, 49152))).float()
    rows = sequences(600)
    changed = np.mean(np.array(draw_tokens(logits, rows).token_ids) != draw_tokens(moved, rows).token_ids)
    assert changed < 0.04


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1e-6, 1e6])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 5), (9, 1000), (40, 49152), (3, 151936)])
def test_plain_draws_are_those_of_numpy(rows: int, vocabulary: int, temperature: float, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(scale=3.0, size=(rows, vocabulary))).to(dtype)
    before = logits.clone()
    given = sequences(rows, temperature=temperature, seed=4, key=9)
    drawn = draw_tokens(logits, given)
    assert torch.equal(logits, before)
    assert drawn.tokens.tolist() == drawn.token_ids
    assert all(drawn.finite)
    assert drawn.logprobs == drawn.sampling_logprobs
    scores = before.double().numpy()
    logprobs = log_softmax(scores / (temperature or 1.0))
    if temperature:
        expected = drawn_by_numpy(logprobs, 4, 9)
        assert (np.array(drawn.token_ids) != expected).sum() <= 1  # float32's exponential moves a sum a little
    else:
        assert drawn.token_ids == scores.argmax(-1).tolist()
    wanted = logprobs[np.arange(rows), drawn.token_ids]
    np.testing.assert_allclose(drawn.logprobs, wanted, rtol=1e-6, atol=2e-6)


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, [300, 301, 700]] = 2.0
    assert draw_tokens(logits, sequences(1, temperature=0.0)).token_ids == [300]


@pytest.mark.parametrize("vocabulary", [11, 3000])
def test_processed_draws_are_those_of_numpy(vocabulary: int) -> None:
    """Rows of all settings and lengths in one call, each by the definitions in float64."""
    rng = np.random.default_rng(1)
    settings: list[dict[str, Any]] = [
        {},
        {"top_k": 4},
        {"top_k": 4, "temperature": 2.0, "top_p": 0.7},
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"top_p": 1e-9},
        {"top_p": 0.999, "temperature": 1.5},  # of 3,000 tokens, more than NUCLEUS stay
        {"min_p": 0.3},
        {"min_p": 0.999},
        {"repetition_penalty": 3.0, "temperature": 0.5},
        {"repetition_penalty": 3.0, "temperature": 0.0},
        {"logit_bias": ((0, 5.0), (10, -1e6)), "min_p": 0.01},
        {"logit_bias": ((7, 1e6),)},
        {"logit_bias": tuple((token, 2.0) for token in range(11)), "repetition_penalty": 2.0},
    ]
    given = []
    for i in range(120):
        prompt = tuple(int(t) for t in rng.integers(0, vocabulary, size=1 + i % 7))
        params = SamplingParams(seed=i, **settings[i % len(settings)])
        given.append(Sequence(i, 0, Request(prompt_ids=prompt, params=params)))
        given[-1].token_ids = [int(t) for t in rng.integers(0, vocabulary, size=i % 4)]
    logits = rng.normal(scale=2.0, size=(120, vocabulary)).astype(np.float32)
    drawn = draw_tokens(torch.from_numpy(logits), given)
    differing = 0
    for i, sequence in enumerate(given):
        params = sequence.request.params
        wanted = processed(logits[i], [*sequence.request.prompt_ids, *sequence.token_ids], params)
        plain = log_softmax(logits[i].astype(np.float64) / (params.temperature or 1.0))
        token = drawn.token_ids[i]
        assert drawn.sampling_logprobs[i] == pytest.approx(wanted[token], abs=1e-5)
        assert drawn.logprobs[i] == pytest.approx(plain[token], abs=1e-5)
        own = drawn_by_numpy(wanted[None], i, 0, len(sequence.token_ids))[0]
        differing += token != (own if params.temperature else int(wanted.argmax()))
    assert differing == 0


@pytest.mark.parametrize("more", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "all -inf"])
def test_a_row_that_is_not_finite_ends_alone(more: dict[str, Any], bad: Any) -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 700))).float()
    expected = draw_tokens(logits, sequences(5, **more))
    if isinstance(bad, str):
        logits[2] = -torch.inf
    else:
        logits[2, 600] = bad
    given = sequences(5, **more)
    drawn = draw_tokens(logits, given)
    assert drawn.finite == [True, True, False, True, True]
    assert [s.is_finished for s in given] == [False, False, True, False, False]
    assert given[2].error.startswith("the model gave non-finite logits for token 0 of sample 2; try --set model.dtype")
    for i in (0, 1, 3, 4):
        assert drawn.token_ids[i] == expected.token_ids[i]
        assert drawn.logprobs[i] == expected.logprobs[i]
        assert drawn.sampling_logprobs[i] == expected.sampling_logprobs[i]


def test_a_token_ruled_out_by_minus_infinity_is_fine() -> None:
    for more in ({}, {"temperature": 1e6}, {"top_k": 3}, {"repetition_penalty": 2.0}):
        drawn = draw_tokens(torch.tensor([[0.0, -float("inf"), 0.0]]).expand(50, -1), sequences(50, (0, 1, 2), **more))
        assert set(drawn.token_ids) == {0, 2}
        assert drawn.logprobs == pytest.approx([-np.log(2)] * 50)


def test_completions_are_collected_in_order_and_errors_name_their_request() -> None:
    requests = [Request(prompt_ids=(1,), params=SamplingParams(max_new_tokens=1), num_samples=2) for _ in range(3)]
    done = make_sequences(requests)
    for token, sequence in enumerate(done):
        sequence.append(token, -1.0, -2.0, context_length=8)
    assert [c.token_ids for c in collect(done[::-1])] == [(i,) for i in range(6)]
    done[3].error = "it broke; mend it"
    with pytest.raises(GenerationError, match="^request 1: it broke; mend it$") as caught:
        collect(done)
    assert [c.token_ids for c in caught.value.completions] == [(0,), (1,), (4,), (5,)]
    assert caught.value.completions[0].sampling_logprobs == (-2.0,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number, 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"temperature": float("inf")}, "temperature must be a finite number"),
        ({"temperature": 1e-9}, r"temperature must be a finite number, 0 \(greedy\) or 1e-06 to 1e\+06, got 1e-09"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": True}, "temperature must be a number, got True"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": -5}, "max_new_tokens must be at least 1, got -5"),
        ({"max_new_tokens": "3"}, "max_new_tokens must be an integer, got '3'"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be an integer, got 2.0"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer, got True"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**64}, "seed must be at least 0 and below"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"stop_token_ids": [1]}, r"stop_token_ids must be a tuple of token ids, 0 or more each, got \[1\]"),
        ({"stop_token_ids": ("a",)}, "stop_token_ids must be a tuple of token ids"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids must be a tuple of token ids"),
        ({"stop_token_ids": 2}, "stop_token_ids must be a tuple of token ids"),
        ({"top_k": -1}, r"top_k must be 0 \(off\) or more, got -1"),
        ({"top_k": 2.5}, "top_k must be an integer, got 2.5"),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1 \(off\), got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p must be above 0 and at most 1"),
        ({"top_p": "all"}, "top_p must be a number"),
        ({"min_p": -0.1}, r"min_p must be at least 0 \(off\) and below 1, got -0.1"),
        ({"min_p": 1.0}, "min_p must be at least 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": -1}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": "1"}, "repetition_penalty must be a number"),
        ({"logit_bias": {5: 1.0}}, "logit_bias must be a tuple of pairs"),
        ({"logit_bias": ((5, 1.0, 2),)}, "logit_bias must be a tuple of pairs"),
        ({"logit_bias": ((-5, 1.0),)}, "logit_bias must be a tuple of pairs"),
        (
            {"logit_bias": ((5, float("inf")),)},
            "the logit_bias of token 5 must be a finite number, at most 1e6, got inf",
        ),
        ({"logit_bias": ((5, float("nan")),)}, "the logit_bias of token 5 must be a finite number"),
        ({"logit_bias": ((5, "x"),)}, "the logit_bias of token 5 must be a number, got 'x'"),
        ({"logit_bias": ((5, 1.0), (5, 2.0))}, "logit_bias names token 5 twice"),
    ],
    ids=str,
)
def test_sampling_parameters_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingParams(**values)


def test_what_is_plain() -> None:
    assert SamplingParams().is_plain
    assert SamplingParams(temperature=0, max_new_tokens=np.int64(3), top_p=1, seed=np.int64(4)).is_plain  # type: ignore[arg-type]
    for more in (
        {"top_k": 1},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": ((1, 0.0),)},
    ):
        assert not SamplingParams(**more).is_plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.0}, {"top_p": 0.8, "top_k": 90, "repetition_penalty": 1.3}], ids=str
)
def test_a_device_without_float64_draws_the_same(
    elsewhere: Callable[[Tensor], Tensor], params: dict[str, Any], dtype: torch.dtype
) -> None:
    """Apple's mps: torch refused the sums and draws in float64, so nothing could be sampled there."""
    logits = torch.from_numpy(np.random.default_rng(0).normal(scale=3.0, size=(7, 1000))).to(dtype)
    rows = [*sequences(4, seed=4, **params), *sequences(3, seed=5, temperature=0.7)]
    here = draw_tokens(logits, rows)
    there = draw_tokens(elsewhere(logits), rows)
    assert torch.equal(here.tokens, there.tokens.as_subclass(Tensor))
    assert (here.token_ids, here.logprobs, here.sampling_logprobs) == (
        there.token_ids, there.logprobs, there.sampling_logprobs,
    )  # fmt: skip
