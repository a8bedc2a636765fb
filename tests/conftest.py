"""Shared fixtures: tiny random models for most tests, and the real embedded model for a few."""

# First, as it drops the lines that torchao logs when transformers imports it.
import tinylora  # noqa: F401

# isort: split
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from no_float64 import NoFloat64
from tiny_tokenizer import VOCABULARY, byte_tokenizer
from transformers import GPT2Config, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from tinylora.generation.native.kernels.build import NoKernels, library
from tinylora.models.base import BaseModel
from tinylora.models.load import load_base_model
from tinylora.reporting import charts
from tinylora.reporting.figures import Figure
from tinylora.system import device


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests that take long come first, so that no worker is left with one of them at the end."""
    long = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("model")}
    items.sort(key=lambda item: item.path not in long)


def _build(model_class: Callable[[Any], PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.3)  # far from the small initial weights, under which every answer is the same
    return model.to(torch.float32).eval()


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """3 layers with grouped-query attention; embeddings and output head untied. Each call builds its own."""
    return _build(
        transformers.LlamaForCausalLM,
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    )


@pytest.fixture
def tiny_qwen2() -> PreTrainedModel:
    """2 layers, biases in q, k and v, tied embeddings."""
    return _build(
        transformers.Qwen2ForCausalLM,
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            eos_token_id=2,
        ),
    )


@pytest.fixture
def tiny_gpt2() -> PreTrainedModel:
    """2 layers of Conv1D maps, whose weights are stored (in, out)."""
    return _build(
        transformers.GPT2LMHeadModel,
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
        ),
    )


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: `byte_tokenizer`."""
    return byte_tokenizer()


@pytest.fixture
def tiny_folder(tmp_path: Path, tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny Llama and its tokenizer, saved as a transformers folder."""
    folder = tmp_path / "tiny-llama"
    tiny_llama.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def compiled_kernels() -> Path | None:
    """The library of C kernels that tiny models need, compiled into the user's cache; None without a compiler."""
    try:
        return library(torch.float32).path
    except NoKernels:
        return None


@pytest.fixture(scope="session", autouse=True)
def own_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's data folder, for all tests of a session: what they make is theirs, and none of this user's is seen."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLORA_DATA", str(folder))
        yield folder


@pytest.fixture
def a_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, this is another user's machine: nothing that was made before is one's own."""
    return lambda: monkeypatch.setenv("TINYLORA_DATA", str(tmp_path / "data-of-another"))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for one test, which is not there yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TINYLORA_CACHE", str(folder))
    return folder


@pytest.fixture
def fresh_cache(compiled_kernels: Path | None, empty_cache: Path) -> Path:
    """A cache folder for one test, with nothing but the C kernels in it, which take seconds to compile."""
    if compiled_kernels is not None:
        (empty_cache / "kernels").mkdir(parents=True)
        shutil.copy2(compiled_kernels, empty_cache / "kernels")
    return empty_cache


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures have their tables and an empty drawing: for tests of all else, as drawing is what takes a page's time."""

    def table(name: str, title: str, caption: str, section: str, columns: Any, rows: Any, *_: Any, **__: Any) -> Figure:
        return Figure(
            name=name, title=title, caption=caption, section=section, columns=tuple(columns),
            rows=tuple(map(tuple, rows)), svg='<svg role="img"></svg>', png=b"",
        )  # fmt: skip

    monkeypatch.setattr(charts, "draw_figure", table)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.Tensor], NoFloat64]:
    """Puts tensors on a device without float64, which is the CPU in all else."""
    monkeypatch.setattr(device, "NO_FLOAT64", frozenset({"cpu"}))
    return lambda x: x.clone().as_subclass(NoFloat64)


@pytest.fixture(scope="session")
def smollm2() -> Iterator[BaseModel]:
    """The real embedded model in float32 on the CPU, loaded once; the first time ever, it is fetched."""
    yield load_base_model("smollm2-135m-instruct", device="cpu", dtype="float32")
