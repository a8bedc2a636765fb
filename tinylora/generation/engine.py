"""What every rollout engine is, and which one serves a model."""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from transformers import PreTrainedModel

from tinylora.adapter.trained import Trained
from tinylora.generation.native.engine import KV_BUDGET_BYTES, NativeEngine
from tinylora.generation.transformers_backend import TransformersEngine
from tinylora.generation.types import Completion, Request
from tinylora.models.architecture import Unsupported

Backend = Literal["native", "transformers"]


class Engine(Protocol):
    """generate(requests) -> completions. An engine knows no task, no reward, no text."""

    name: str
    model: PreTrainedModel
    context_length: int
    max_batch_rows: int
    arithmetic: str
    """What decides its last digits besides settings and machine, in words: kernels, and the layout of the weights."""

    @property
    def adapter(self) -> Trained | None:
        """Whose vectors requests may bring."""

    def room_for_reply(self, prompt_length: int) -> int:
        """New tokens that there is memory for behind a prompt of this length; the context may end a reply before."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions of all requests, ordered by (request, sample).

        Raises: UserError, before anything is sampled, for a request that cannot be run; GenerationError, with the
        completions of all other requests, for one whose logits are not finite.
        """


def make_engine(
    model: PreTrainedModel,
    *,
    backend: Backend = "native",
    context_length: int,
    pad_token_id: int = 0,
    adapter: Trained | None = None,
    max_batch_rows: int = 128,
    kv_budget_bytes: int = KV_BUDGET_BYTES,
    cuda_graphs: bool = True,
    say: Callable[[str], None],
) -> Engine:
    """The engine for a model: `backend`, or for a model that "native" does not cover "transformers", and `say` says so.

    Raises: UserError for a batch or budget that is too small.
    """
    if backend == "native":
        try:
            engine = NativeEngine(
                model,
                context_length=context_length,
                pad_token_id=pad_token_id,
                adapter=adapter,
                max_batch_rows=max_batch_rows,
                kv_budget_bytes=kv_budget_bytes,
                cuda_graphs=cuda_graphs,
            )
        except Unsupported as reason:
            say(f"the native rollout engine does not cover this model, so transformers samples, slower: {reason}")
        else:
            if engine.note:
                say(engine.note)
            return engine
    return TransformersEngine(
        model,
        context_length=context_length,
        pad_token_id=pad_token_id,
        adapter=adapter,
        max_batch_rows=max_batch_rows,
    )
