"""make_engine: the native engine where it can be, transformers where not, and a line that says why."""

import pytest
import torch
from engine_conformance import CONTEXT, GREEDY, PROMPTS, requests_of, tiny

from tinylora.errors import UserError
from tinylora.generation.engine import make_engine
from tinylora.generation.native import engine as native_backend
from tinylora.generation.native.kernels.build import NoKernels


@pytest.mark.parametrize("name", ["bloom", "gpt2"])
def test_a_model_that_is_not_covered_goes_to_transformers_and_one_line_says_why(name: str) -> None:
    said: list[str] = []
    model = tiny(name)
    engine = make_engine(model, context_length=CONTEXT, say=said.append)
    assert engine.name == "transformers"
    (line,) = said
    assert line.startswith("the native rollout engine does not cover this model, so transformers samples, slower: ")
    assert type(model).__name__ in line
    assert "\n" not in line
    assert len(engine.generate(requests_of(GREEDY))) == len(PROMPTS)


@pytest.mark.parametrize("backend", ["native", "transformers"])
def test_a_covered_model_gets_what_was_asked_for_and_nothing_is_said(backend: str) -> None:
    said: list[str] = []
    model = tiny("llama")
    engine = make_engine(model, backend=backend, context_length=100, max_batch_rows=3, say=said.append)  # type: ignore[arg-type]
    assert (engine.name, engine.context_length, engine.max_batch_rows, engine.adapter) == (backend, 100, 3, None)
    assert engine.model is model
    assert said == []


def test_a_model_that_was_asked_for_transformers_is_not_looked_at() -> None:
    said: list[str] = []
    assert (
        make_engine(tiny("bloom"), backend="transformers", context_length=CONTEXT, say=said.append).name
        == "transformers"
    )
    assert said == []


def test_missing_c_kernels_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(architecture: object) -> None:
        raise NoKernels("there is no compiler")

    monkeypatch.setattr(native_backend, "NativeKernels", none)
    said: list[str] = []
    assert make_engine(tiny("llama"), context_length=CONTEXT, say=said.append).name == "native"
    assert said == ["the rollout engine runs without its C kernels, and slower: there is no compiler"]


@pytest.mark.parametrize("backend", ["native", "transformers"])
def test_a_mistake_of_the_user_is_no_reason_to_fall_back(backend: str) -> None:
    with pytest.raises(UserError, match="max_batch_rows must be at least 1, got 0"):
        make_engine(tiny("llama"), backend=backend, context_length=CONTEXT, max_batch_rows=0, say=print)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"KV budget of 5 bytes .* raise generation.kv_budget_gib"):
        make_engine(tiny("llama"), context_length=CONTEXT, kv_budget_bytes=5, say=print)


def test_other_dtypes_run_on_the_torch_kernels() -> None:
    said: list[str] = []
    engine = make_engine(tiny("llama").to(torch.float64), context_length=CONTEXT, say=said.append)
    assert engine.name == "native"
    assert said == [
        "the rollout engine runs without its C kernels, and slower: "
        "they are written for bfloat16 and float32, not float64"
    ]
