"""What only the native engine does: blocks, stretches of prompts, shared keys and values, places taken at once."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engine_conformance import GREEDY, PROMPTS, VOCABULARY, key_of, reference_logprobs, requests_of, sampled, tiny
from engine_requests import LONG, mixed_requests, vectors
from torch import Tensor
from transformers import PreTrainedModel

from tinylora.adapter.attach import AttachedAdapter, attach
from tinylora.adapter.config import AdapterConfig
from tinylora.errors import UserError
from tinylora.generation.native.engine import NativeEngine, _distinct_vectors
from tinylora.generation.sequences import GenerationError
from tinylora.generation.types import Completion, Request, SamplingParams

CONTEXT = 400
KERNELS = [True, False]

both_kernels = pytest.mark.parametrize("use_c", KERNELS, ids=["c", "torch"])


def engine_of(model: PreTrainedModel, **more: Any) -> NativeEngine:
    return NativeEngine(model, **{"context_length": CONTEXT, **more})


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """For tests that leave the model as it is."""
    return tiny("llama")


@pytest.fixture
def adapted() -> Iterator[tuple[PreTrainedModel, AttachedAdapter]]:
    model = tiny("llama")
    adapter = attach(model, AdapterConfig(u=2, n_tie=4))
    yield model, adapter


def check_logprobs(
    model: PreTrainedModel,
    requests: list[Request],
    found: list[Completion],
    adapter: AttachedAdapter | None = None,
    atol: float = 2e-5,
) -> None:
    assert [(c.request_index, c.sample_index) for c in found] == [
        (i, j) for i, request in enumerate(requests) for j in range(request.num_samples)
    ]
    for completion in found:
        request = requests[completion.request_index]
        if adapter is not None:
            adapter.write(request.v)
        expected = reference_logprobs(model, request.prompt_ids, completion.token_ids, request.params.temperature)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=atol)
    if adapter is not None:
        adapter.write(None)


def counted(engine: NativeEngine) -> list[tuple[int, int]]:
    """(tokens, logits asked for) of each forward pass from now on."""
    passes: list[tuple[int, int]] = []
    inner = engine._runner.forward

    def forward(token_ids: Tensor, plan: Any, cache: Any, R: Any, owner: Tensor, keep: Tensor) -> Tensor:
        passes.append((len(token_ids), len(keep)))
        assert len(owner) == len(token_ids) == plan.num_tokens
        return inner(token_ids, plan, cache, R, owner, keep)

    engine._runner.forward = forward  # type: ignore[method-assign]
    return passes


# Memory


def test_a_budget_below_one_block_is_refused(llama: PreTrainedModel) -> None:
    # 3 layers, keys (2 heads of 8) and values (padded to 16 each), float32
    size = 3 * 64 * (2 * 8 + 2 * 16) * 4
    with pytest.raises(
        UserError, match=f"KV budget of {size - 1} bytes does not hold 64 tokens .* {size} bytes; raise"
    ):
        engine_of(llama, kv_budget_bytes=size - 1)
    assert engine_of(llama, kv_budget_bytes=size).block_bytes == size
    # A sequence has at least one block for its prompt and one for its completion.
    assert len(engine_of(llama, kv_budget_bytes=2 * size).generate(requests_of(GREEDY))) == len(PROMPTS)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_sequence_that_cannot_fit_is_refused_before_anything_is_sampled(
    llama: PreTrainedModel, num_samples: int
) -> None:
    def never(token_ids: list[int]) -> bool:
        raise AssertionError("sampled")

    requests = [
        Request(prompt_ids=(5,), params=GREEDY, should_stop=never),
        Request(prompt_ids=LONG[:100], params=sampled(n=30), num_samples=num_samples),
    ]
    block = engine_of(llama).block_bytes
    needed = 3 if num_samples == 1 else 2 + 1
    with pytest.raises(UserError, match=rf"request 1 may need {needed * 64} tokens of cache \(a prompt of 100, 30 new"):
        engine_of(llama, kv_budget_bytes=(needed - 1) * block).generate(requests)
    fitting = engine_of(llama, kv_budget_bytes=needed * block)
    with pytest.raises(AssertionError, match="sampled"):
        fitting.generate(requests)
    check_logprobs(llama, requests[1:], fitting.generate(requests[1:]))


@pytest.fixture(scope="module")
def wide(llama: PreTrainedModel) -> list[Completion]:
    return engine_of(llama).generate(mixed_requests())


def test_long_prompts_have_the_logprobs_of_a_full_pass(llama: PreTrainedModel, wide: list[Completion]) -> None:
    check_logprobs(llama, mixed_requests(), wide)
    assert {c.finish_reason for c in wide} == {"stop", "length"}


@both_kernels
@pytest.mark.parametrize(
    "more",
    [
        {"blocks": 5},
        {"blocks": 6, "max_batch_rows": 3},
        {"blocks": 12},
        {"prefill_tokens": 1},
        {"prefill_tokens": 7, "max_batch_rows": 4},
        {"prefill_tokens": 3, "blocks": 7},
        {"prefill_tokens": 65, "max_batch_rows": 1},
    ],
    ids=str,
)
def test_room_and_stretches_change_nothing(
    llama: PreTrainedModel, wide: list[Completion], more: dict[str, int], use_c: bool
) -> None:
    more = dict(more)
    if "blocks" in more:
        more["kv_budget_bytes"] = more.pop("blocks") * engine_of(llama).block_bytes
    found = engine_of(llama, use_c=use_c, **more).generate(mixed_requests())
    assert [key_of(c) for c in found] == [key_of(c) for c in wide]
    for a, b in zip(found, wide, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_with_products_of_our_own_bfloat16_does_not_depend_on_the_batch_either(name: str) -> None:
    """Bit for bit, log-probs included, where prompts share no beginning: that would be summed in another order."""
    model = tiny(name).to(torch.bfloat16)
    if not getattr(engine_of(model).kernels, "has_product", False):
        pytest.skip("oneDNN does the products here, in an order that depends on the number of rows")
    requests = [
        Request(prompt_ids=(3 + i, *LONG[:length]), params=sampled(n=n), num_samples=1 + i % 3, key=i)
        for i, (length, n) in enumerate([(3, 40), (63, 5), (64, 30), (130, 20), (1, 1), (200, 40), (20, 64)])
    ]
    together = engine_of(model).generate(requests)
    assert engine_of(model, max_batch_rows=3, prefill_tokens=50).generate(requests) == together
    alone = [completion for request in requests for completion in engine_of(model).generate([request])]
    assert [(c.token_ids, c.logprobs) for c in alone] == [(c.token_ids, c.logprobs) for c in together]


@both_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_what_memory_held_before_does_not_matter(name: str, dtype: torch.dtype, use_c: bool) -> None:
    model = tiny(name).to(dtype)
    requests = [r for r in mixed_requests() if len(r.prompt_ids) + r.params.max_new_tokens <= 128]
    for more in ({}, {"prefill_tokens": 7, "max_batch_rows": 3}):
        engine = engine_of(model, context_length=128, use_c=use_c, **more)
        found = []
        for garbage in (0.0, torch.nan, torch.inf):
            kernels = engine_of(model, use_c=use_c).kernels

            def new_cache(num_blocks: int, kernels: Any = kernels, garbage: float = garbage) -> Any:
                cache = kernels.new_cache(num_blocks)
                cache.memory.fill_(garbage)
                return cache

            engine.kernels.new_cache = new_cache  # type: ignore[method-assign]
            found.append(engine.generate(requests))
        assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", ["mistral", "gemma3", "qwen3"])
def test_windows_over_several_blocks(name: str) -> None:
    model = tiny(name)
    requests = [r for r in mixed_requests() if len(r.prompt_ids) + r.params.max_new_tokens <= 128]
    check_logprobs(model, requests, engine_of(model, context_length=128, prefill_tokens=50).generate(requests))


@both_kernels
@pytest.mark.parametrize("length", [31, 32, 33, 63, 64, 65, 100, 128, 130])
@pytest.mark.parametrize("num_samples", [1, 2])
def test_prompts_that_begin_alike(
    adapted: tuple[PreTrainedModel, AttachedAdapter], length: int, num_samples: int, use_c: bool
) -> None:
    model, adapter = adapted
    v, w = vectors(adapter, 2)
    common = LONG[:length]
    prompts = [(*common, 3), (*common, *LONG[150:230]), (*common, 9, 8, 7), (*common, *LONG[130:195])]
    for owners in ((None,) * 4, (v, w, v, w), (None, v, v.clone(), None)):
        requests = [
            Request(prompt_ids=prompt, params=sampled(n=4), num_samples=num_samples, key=i, v=owner)
            for i, (prompt, owner) in enumerate(zip(prompts, owners, strict=True))
        ]
        engine = engine_of(model, adapter=adapter, use_c=use_c)
        passes = counted(engine)
        check_logprobs(model, requests, engine.generate(requests), adapter)
        shared = length if length >= 32 else 0
        distinct = len(
            {id(owner) for owner in owners if owner is not None} - ({id(owners[2])} if owners[0] is None else set())
        ) + (None in [o if o is None else 0 for o in owners])
        prompt_tokens = sum(map(len, prompts)) - (4 - distinct) * shared
        decoded = 4 * num_samples * 3
        assert sum(n for n, _ in passes) == prompt_tokens + decoded


# Sharing


def test_requests_with_equal_prompts_and_vectors_share_the_prefill(
    adapted: tuple[PreTrainedModel, AttachedAdapter],
) -> None:
    model, adapter = adapted
    (v,) = vectors(adapter, 1)
    for owners, distinct in (((None, None), 1), ((v, v), 1), ((v, v.clone()), 1), ((None, v), 2), ((None, 0 * v), 1)):
        engine = engine_of(model, adapter=adapter)
        passes = counted(engine)
        requests = [
            Request(prompt_ids=PROMPTS[4], params=sampled(n=1), num_samples=3, key=i, v=owner)
            for i, owner in enumerate(owners)
        ]
        found = engine.generate(requests)
        assert passes == [(17 * distinct, distinct)]
        check_logprobs(model, requests, found, adapter)
        assert len({c.token_ids for c in found}) > 1


def test_samples_of_a_prompt_that_find_no_place_at_first_need_no_second_prefill(llama: PreTrainedModel) -> None:
    engine = engine_of(llama, max_batch_rows=2)
    passes = counted(engine)
    requests = [Request(prompt_ids=PROMPTS[4], params=sampled(n=4), num_samples=7)]
    found = engine.generate(requests)
    check_logprobs(llama, requests, found)
    assert sum(n for n, _ in passes) == 17 + 7 * 3


def test_a_place_that_is_free_is_taken_at_once(llama: PreTrainedModel) -> None:
    """Rows of known lengths over 4 places: as many steps as if each row started where the first one ended."""
    lengths = [9, 2, 5, 1, 7, 3, 3, 8, 1, 6, 2, 4]
    prompts = [(10 + i, 20) for i in range(len(lengths))]
    requests = [
        Request(prompt_ids=prompt, params=SamplingParams(max_new_tokens=n), key=n)
        for prompt, n in zip(prompts, lengths, strict=True)
    ]
    engine = engine_of(llama, max_batch_rows=4)
    passes = counted(engine)
    found = engine.generate(requests)
    assert [len(c.token_ids) for c in found] == lengths
    places = [0, 0, 0, 0]
    for n in lengths:  # a row's n tokens take n steps: the first of them computes the prompt
        at = places.index(min(places))
        places[at] += n
    assert len(passes) == max(places)
    assert sum(kept for _, kept in passes) == sum(lengths)


def test_equal_vectors_are_one_and_64_different_ones_run_together(
    adapted: tuple[PreTrainedModel, AttachedAdapter],
) -> None:
    model, adapter = adapted
    many = vectors(adapter, 64)
    requests = [
        Request(prompt_ids=PROMPTS[3], params=sampled(n=3), num_samples=2, key=i, v=v) for i, v in enumerate(many)
    ]
    engine = engine_of(model, adapter=adapter)
    passes = counted(engine)
    found = engine.generate(requests)
    check_logprobs(model, requests, found, adapter)
    assert passes == [(64 * 9, 64), (128, 128), (128, 128)]


# Adapters


@both_kernels
@pytest.mark.parametrize(
    "targets", [("v_proj", "down_proj"), ("q_proj",), ("o_proj", "up_proj"), ("gate_proj",)], ids=str
)
@pytest.mark.parametrize(("rank", "u"), [(1, 1), (2, 3), (3, 2)])
def test_some_maps_have_no_adapter(targets: tuple[str, ...], rank: int, u: int, use_c: bool) -> None:
    model = tiny("qwen2")
    adapter = attach(model, AdapterConfig(rank=rank, u=u, n_tie=2, targets=targets))
    v, w = vectors(adapter, 2)
    requests = [
        Request(prompt_ids=prompt, params=sampled(n=5), num_samples=2, key=i, v=owner)
        for i, (prompt, owner) in enumerate(zip(PROMPTS[1:5], (v, None, w, v), strict=True))
    ]
    found = engine_of(model, adapter=adapter, use_c=use_c).generate(requests)
    check_logprobs(model, requests, found, adapter)
    adapter.write(v)  # and it matters
    base = reference_logprobs(model, PROMPTS[3], found[4].token_ids, 1.0)
    adapter.write(w)
    assert np.abs(base - reference_logprobs(model, PROMPTS[3], found[4].token_ids, 1.0)).max() > 1e-3


def test_float64_models_run_on_the_torch_kernels() -> None:
    model = tiny("llama").double()
    adapter = attach(model, AdapterConfig(u=2, n_tie=4))
    engine = engine_of(model, adapter=adapter)
    assert engine.kernels.name == "torch"
    assert "float64" in engine.note
    (v,) = vectors(adapter, 1)
    requests = requests_of(sampled(n=6), num_samples=2, v=v)
    check_logprobs(model, requests, engine.generate(requests), adapter, atol=1e-6)  # the sampler takes float32


def test_without_c_there_is_no_note(llama: PreTrainedModel) -> None:
    engine = engine_of(llama, use_c=False)
    assert (engine.kernels.name, engine.note) == ("torch", "")


def test_after_detach_only_the_base_model_is_sampled(adapted: tuple[PreTrainedModel, AttachedAdapter]) -> None:
    """The engine keeps the maps that it was made of; a vector has nothing to act on any more and is refused."""
    model, adapter = adapted
    (v,) = vectors(adapter, 1)
    engine = engine_of(model, adapter=adapter)
    base, changed = (Request(prompt_ids=PROMPTS[3], params=sampled(), v=one) for one in (None, v))
    before = engine.generate([base])
    adapter.detach()
    assert engine.generate([base]) == before
    with pytest.raises(UserError, match="the adapter was taken off the model; attach it again first"):
        engine.generate([changed])


# Trouble


class Trouble(Exception):
    pass


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
def test_an_error_in_should_stop_leaves_the_engine_as_good_as_before(
    llama: PreTrainedModel, error: type[BaseException]
) -> None:
    def fail(token_ids: list[int]) -> bool:
        if len(token_ids) == 4:
            raise error
        return False

    engine = engine_of(llama, max_batch_rows=3)
    good = mixed_requests()[:5]
    expected = engine.generate(good)
    with pytest.raises(error):
        engine.generate([*good[:2], Request(prompt_ids=PROMPTS[3], params=sampled(), should_stop=fail), *good[2:]])
    assert engine.generate(good) == expected


def test_an_engine_goes_on_after_a_request_that_overflowed(
    adapted: tuple[PreTrainedModel, AttachedAdapter],
) -> None:
    """More samples than places, so that some of a prompt without a distribution come to their places later."""
    model, adapter = adapted
    (v,) = vectors(adapter, 1)
    bad = Request(prompt_ids=PROMPTS[5], params=sampled(), num_samples=7, v=torch.full_like(v, 3e38))
    good = requests_of(sampled(), num_samples=3, v=v)
    engine = engine_of(model, adapter=adapter, max_batch_rows=2, prefill_tokens=11)
    expected = engine.generate(good)
    with pytest.raises(GenerationError, match="^request 6: the model gave non-finite logits for token 0 of sample 0"):
        engine.generate([*good, bad])
    assert engine.generate(good) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    adapter = attach(model, AdapterConfig(u=2, n_tie=4))
    v, w = vectors(adapter, 2)
    requests = [r for owner in (None, v, w) for r in requests_of(sampled(), num_samples=3, v=owner)]
    engine = engine_of(model, adapter=adapter, max_batch_rows=7)
    assert engine.generate(requests) == engine.generate(requests)


@both_kernels
def test_a_model_converted_under_its_adapter_is_refused(
    adapted: tuple[PreTrainedModel, AttachedAdapter], use_c: bool
) -> None:
    """Bug met here: converting the model converts the factors too, and C read their bits as float32."""
    model, adapter = adapted
    with pytest.raises(UserError, match=r"adapter's factors are bfloat16, not float32: .* attach it again"):
        engine_of(model.bfloat16(), adapter=adapter, use_c=use_c)


@pytest.mark.parametrize(
    ("name", "message"), [("max_batch_rows", "generation.max_batch_rows"), ("prefill_tokens", "prefill_tokens")]
)
def test_sizes_below_one_are_refused(llama: PreTrainedModel, name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"{message} must be at least 1, got 0"):
        engine_of(llama, **{name: 0})


def test_no_requests_and_the_least_context(llama: PreTrainedModel) -> None:
    assert engine_of(llama).generate([]) == []
    (found,) = engine_of(llama, context_length=2).generate([Request(prompt_ids=(7,), params=sampled(n=50))])
    assert (len(found.token_ids), found.finish_reason) == (1, "length")


# Shapes


def _small(**more: Any) -> PreTrainedModel:
    config = transformers.LlamaConfig(
        **{
            "vocab_size": VOCABULARY, "hidden_size": 36, "intermediate_size": 44, "num_hidden_layers": 2,
            "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": CONTEXT,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, **more,
        }
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model.float().eval()


@both_kernels
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"head_dim": 20},
        {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 6, "attention_bias": True, "mlp_bias": True},
        {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 96},
        {"num_hidden_layers": 1, "hidden_size": 5, "intermediate_size": 3, "num_attention_heads": 1, "head_dim": 2},
        {"vocab_size": 17},
    ],
    ids=str,
)
def test_odd_shapes(more: dict[str, Any], use_c: bool) -> None:
    model = _small(**more)
    requests = [
        Request(prompt_ids=tuple(t % 17 for t in LONG[:length]), params=sampled(n=5), num_samples=1 + i % 3, key=i)
        for i, length in enumerate((1, 9, 64, 130))
    ]
    check_logprobs(model, requests, engine_of(model, use_c=use_c).generate(requests))


def test_the_model_is_only_read(adapted: tuple[PreTrainedModel, AttachedAdapter]) -> None:
    model, adapter = adapted
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (v,) = vectors(adapter, 1)
    engine_of(model, adapter=adapter).generate(requests_of(sampled(), v=v))
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_vectors_are_told_apart_where_the_device_has_no_float64(
    elsewhere: Callable[[Tensor], Tensor],
) -> None:
    v = torch.randn(2, 3)
    requests = [Request(prompt_ids=(3,), params=sampled(), v=elsewhere(one)) for one in (v, 2 * v, v, 0 * v)]
    vectors, owners = _distinct_vectors(requests)
    assert owners == [0, 1, 0, 2] and vectors[2] is None
