"""Rollouts for methods whose numbers are not TinyLoRA's v, by the same engines.

Three ways: what the method computes beside, before and behind the frozen maps, in the native engine; there, too, the
model with other weights (full); and the method's own layers through transformers, for models that the native engine
does not cover. Vectors of one call are run one after the other, and the engine of the last one is kept.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tinylora.adapter.attach import AttachedAdapter
from tinylora.adapter.layer import AdaptedLinear, Vector
from tinylora.adapter.trained import Trained
from tinylora.config.run import RunConfig
from tinylora.generation.engine import Engine, make_engine
from tinylora.generation.native.engine import NativeEngine
from tinylora.generation.native.runner import Around
from tinylora.generation.requests import check_requests
from tinylora.generation.sequences import GenerationError
from tinylora.generation.types import Completion, Request
from tinylora.methods.one_vector import MethodAdapter, set_module
from tinylora.models.architecture import Unsupported, describe

Make = Callable[[Trained | None], Engine]
"""An engine for the model as it is when called, for requests with vectors of the given adapter."""


class _Inner(ABC):
    """How one method's vectors are run: a block in which the model is ready, and the vector that requests bring."""

    def __init__(self, adapter: MethodAdapter, make: Make) -> None:
        self.adapter = adapter

    @property
    @abstractmethod
    def first(self) -> Engine:
        """The engine that it begins with, whose name and sizes are those of all."""

    @abstractmethod
    def run(self, v: Tensor | None, requests: list[Request]) -> list[Completion]:
        """Completions of requests without a vector, under v."""


class _OwnLayers(_Inner):
    """An engine that reads the model's modules as they are: one for every vector."""

    def __init__(self, adapter: MethodAdapter, make: Make) -> None:
        super().__init__(adapter, make)
        with adapter.using(None):
            self.engine = make(None)

    @property
    def first(self) -> Engine:
        return self.engine

    def run(self, v: Tensor | None, requests: list[Request]) -> list[Completion]:
        with torch.no_grad(), self.adapter.using(v), self.adapter.for_inference():
            return self.engine.generate(requests)


class _Merged(_Inner):
    """An engine that packs the weights: a new one for every vector."""

    def __init__(self, adapter: MethodAdapter, make: Make) -> None:
        super().__init__(adapter, make)
        self._make = make
        with adapter.using(None):
            self.engine: Engine | None = make(None)
        self._v: Tensor | None = None

    @property
    def first(self) -> Engine:
        assert self.engine is not None
        return self.engine

    def run(self, v: Tensor | None, requests: list[Request]) -> list[Completion]:
        with self.adapter.merged(v):
            if self.engine is None or not _equal(self._v, v):
                self.engine = None  # frees its copy of the weights before there is another
                self.engine, self._v = self._make(None), None if v is None else v.detach().clone()
            return self.engine.generate(requests)


class _Beside(_Inner):
    """An engine of the plain maps: A and B in the places of TinyLoRA's, with R = 1, and functions before and behind.

    Only these change with the vector.
    """

    def __init__(self, adapter: MethodAdapter, make: Make) -> None:
        super().__init__(adapter, make)
        self._v: Tensor | None = None
        self._around: dict[nn.Module, Around] = {}
        self._vector = Vector(torch.zeros(1, 1))
        self._layers: dict[str, AdaptedLinear] = {}
        for one, beside in adapter.beside(adapter.zeros()):
            if beside.factors is None:
                continue
            A, B = beside.factors
            eye = torch.eye(len(A), device=A.device).unsqueeze(0)
            layer = AdaptedLinear(one.plain, A.contiguous(), B.contiguous(), eye, tie_group=0, vector=self._vector)
            self._layers[one.path] = layer
        self._one = _One(adapter)
        with self._mounted():
            self.engine = make(cast(Trained, self._one) if self._layers else None)

    @contextmanager
    def _mounted(self) -> Iterator[None]:
        with self.adapter.using(None):
            try:
                for path, layer in self._layers.items():
                    set_module(self.adapter.model, path, layer)
                yield
            finally:
                for one in self.adapter.wrapped:
                    set_module(self.adapter.model, one.path, one.plain)

    @property
    def first(self) -> Engine:
        return self.engine

    def run(self, v: Tensor | None, requests: list[Request]) -> list[Completion]:
        engine = cast(NativeEngine, self.engine)
        with self._mounted():
            if v is not None and not _equal(self._v, v):
                self._v = None  # until all of it is in place
                around = {}
                for one, beside in self.adapter.beside(v):
                    if beside.factors is not None:
                        layer = self._layers[one.path]
                        layer.A, layer.B = (factor.contiguous() for factor in beside.factors)
                    if beside.around is not None:
                        around[one.plain] = beside.around
                engine.read_factors()
                self._around, self._v = around, v.detach().clone()
            engine.put_around(self._around if v is not None else {})
            one_vector = None if v is None or not self._layers else torch.ones(1, 1, device=v.device)
            return self.engine.generate([replace(request, v=one_vector) for request in requests])


class _One(nn.Module):
    """The adapter of one number that the engine sees: 1 puts the factors on, 0 takes them off."""

    shape = (1, 1)

    def __init__(self, adapter: MethodAdapter) -> None:
        super().__init__()
        self._like = adapter.zeros()[:, :1]

    def zeros(self) -> Tensor:
        return torch.zeros_like(self._like)


class MethodEngine:
    """generate(requests) -> completions under the method's vectors."""

    def __init__(self, adapter: MethodAdapter, model: PreTrainedModel, make: Make, *, native: bool) -> None:
        """native: whether `make` gives the native engine for this model. Raises: UserError as `make` does."""
        self.adapter: Trained = adapter
        self.model = model
        kind: type[_Inner] = _OwnLayers
        if native:
            kind = _Beside if adapter.wrapped else _Merged
        self._inner = kind(adapter, make)
        found_native = isinstance(self._inner.first, NativeEngine)
        if kind is _Beside and not found_native:  # `make` found that it does not cover the model after all
            self._inner = _OwnLayers(adapter, make)
        first = self._inner.first
        self.name = first.name
        self.context_length = first.context_length
        self.max_batch_rows = first.max_batch_rows
        self.arithmetic = first.arithmetic

    def room_for_reply(self, prompt_length: int) -> int:
        """New tokens that there is memory for behind a prompt of this length."""
        return self._inner.first.room_for_reply(prompt_length)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions of all requests, ordered by (request, sample). Raises: as every engine does."""
        requests = list(requests)
        check_requests(
            requests,
            vocabulary_size=int(self.model.get_input_embeddings().weight.shape[0]),
            context_length=self.context_length,
            adapter=self.adapter,
        )
        by_vector: list[tuple[Tensor | None, list[int]]] = []
        for index, request in enumerate(requests):
            known = next((found for v, found in by_vector if v is request.v or _equal(v, request.v)), None)
            if known is None:
                by_vector.append((request.v, [index]))
            else:
                known.append(index)
        found: list[Completion] = []
        failed = ""
        for v, indices in by_vector:
            part = [replace(requests[index], v=None) for index in indices]
            try:
                done = self._inner.run(v, part)
            except GenerationError as error:
                failed, done = failed or str(error), error.completions
            found += [replace(one, request_index=indices[one.request_index]) for one in done]
        found.sort(key=lambda one: (one.request_index, one.sample_index))
        if failed:
            raise GenerationError(failed, found)
        return found


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def engine_for(
    model: PreTrainedModel,
    adapter: AttachedAdapter | MethodAdapter,
    config: RunConfig,
    *,
    context_length: int,
    pad_token_id: int,
    say: Callable[[str], None],
) -> Engine:
    """The engine of a run's settings for a model with any method on it; says so where transformers has to sample.

    Raises: UserError as `make_engine` does.
    """
    backend = config.generation.backend
    is_other = isinstance(adapter, MethodAdapter)
    if isinstance(adapter, MethodAdapter) and backend == "native":
        try:
            with adapter.using(None):
                describe(model)
        except Unsupported as reason:
            say(f"the native rollout engine does not cover this model, so transformers samples, slower: {reason}")
            backend = "transformers"

    def make(vectors: Trained | None) -> Engine:
        return make_engine(
            model,
            backend=backend,
            context_length=context_length,
            pad_token_id=pad_token_id,
            adapter=vectors,
            max_batch_rows=config.generation.max_batch_rows,
            kv_budget_bytes=int(config.generation.kv_budget_gib * 2**30),
            cuda_graphs=config.generation.cuda_graphs and not is_other,  # they would replay the factors of another v
            say=say,
        )

    if isinstance(adapter, MethodAdapter):
        return MethodEngine(adapter, model, make, native=backend == "native")
    return make(adapter)
