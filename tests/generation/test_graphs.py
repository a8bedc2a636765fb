"""Decode steps of fixed shapes: the same tokens and log-probs as the plain engine, from recordings that know no Python.

There need be no GPU: a step is recorded as a graph of torch operations (make_fx), which like a CUDA graph has the
shapes, addresses and Python decisions of its recording for good.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_conformance import sampled, tiny
from engine_requests import LONG, mixed_requests, vectors
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tinylora.adapter.attach import attach
from tinylora.adapter.config import AdapterConfig
from tinylora.errors import UserError
from tinylora.generation.native.engine import NativeEngine
from tinylora.generation.native.graphs import padded_size
from tinylora.generation.native.kernels.reference import TorchKernels
from tinylora.generation.sequences import GenerationError
from tinylora.generation.types import Completion, Request


class FxRecorder:
    """Stands for CUDA graphs."""

    def __init__(self) -> None:
        self.recordings = 0
        self.replays = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = make_fx(run)()
        result = run().clone()
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            result.copy_(graph())

        return replay, result


def engines(model: Any, **more: Any) -> tuple[NativeEngine, NativeEngine, FxRecorder]:
    """The plain engine, and one with recordings and SDPA, which is how a GPU is served."""
    common: dict[str, Any] = {"context_length": 400, "use_c": False, "kv_budget_bytes": 2**24, **more}
    recorder = FxRecorder()
    graphed = NativeEngine(model, recorder=recorder, **common)
    graphed.kernels = graphed._runner.kernels = TorchKernels(graphed.architecture, sdpa=True)
    return NativeEngine(model, **common), graphed, recorder


def close(found: list[Completion], expected: list[Completion]) -> None:
    assert [(c.token_ids, c.finish_reason) for c in found] == [(c.token_ids, c.finish_reason) for c in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)


def test_sizes() -> None:
    assert [padded_size(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 32, 33, 64)] == [1, 2, 4, 8, 8, 16, 16, 32, 32, 48, 64]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3"])
def test_recorded_steps_give_what_plain_ones_give(name: str) -> None:
    model = tiny(name)
    plain, graphed, recorder = engines(model, max_batch_rows=7)
    requests = mixed_requests()
    close(graphed.generate(requests), plain.generate(requests))
    assert recorder.replays > 3 * recorder.recordings > 0
    before = recorder.recordings
    close(graphed.generate(requests), plain.generate(requests))  # another call replays what this one recorded
    assert recorder.recordings == before


def test_vectors_change_under_a_recording() -> None:
    model = tiny("llama")
    adapter = attach(model, AdapterConfig(u=2, n_tie=4))
    plain, graphed, recorder = engines(model, adapter=adapter)
    many = vectors(adapter, 12)
    for chosen in (many[:1], many[1:2], many[2:5], many[5:8], [None, many[8], None], [None]):
        requests = [
            Request(prompt_ids=LONG[i : i + 9 + i], params=sampled(n=12), num_samples=2, key=i, v=v)
            for i, v in enumerate(chosen)
        ]
        close(graphed.generate(requests), plain.generate(requests))
    assert recorder.replays > recorder.recordings


def test_numbers_that_are_not_finite_do_not_stay_in_the_cache() -> None:
    model = tiny("llama")
    plain, graphed, _ = engines(model, kv_budget_bytes=2**18)
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.nan
    # Within its prompt, and in the middle of a completion while others run beside it.
    bad = [
        Request(prompt_ids=(9, *LONG[:70]), params=sampled(n=4), num_samples=2),
        Request(prompt_ids=(4, 5), params=sampled(n=6), num_samples=2, forced_ids=(20, 9, 21, 22, 23, 24)),
    ]
    good = [Request(prompt_ids=LONG[i : i + 80], params=sampled(n=20), key=i) for i in range(4)]
    good = [r for r in good if 9 not in r.prompt_ids]
    for _ in range(3):
        with pytest.raises(GenerationError) as caught:
            graphed.generate([*bad, *good])
        assert len(caught.value.completions) == len(good)
    close(graphed.generate(good), plain.generate(good))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sdpa_computes_the_same_attention(dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    found = []
    for sdpa in (False, True):
        engine = NativeEngine(model, context_length=400, use_c=False)
        engine.kernels = engine._runner.kernels = TorchKernels(engine.architecture, sdpa=sdpa)
        forced = [replace(r, forced_ids=tuple(range(3, 3 + r.params.max_new_tokens))) for r in mixed_requests()]
        found.append(engine.generate(forced))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.15)


def test_a_recording_that_fails_says_how_to_go_on() -> None:
    def fail(run: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    engine = NativeEngine(tiny("llama"), context_length=400, use_c=False, kv_budget_bytes=2**24, recorder=fail)
    message = r"not permitted when stream is capturing\); go on with --set generation\.cuda_graphs"
    with pytest.raises(UserError, match=message):
        engine.generate(mixed_requests())
