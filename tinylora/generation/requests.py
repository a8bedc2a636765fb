"""Every request is looked at before anything is sampled, by the same code in every engine."""

from collections.abc import Sequence

from torch import Tensor

from tinylora.adapter.finite import all_finite
from tinylora.adapter.trained import Trained
from tinylora.errors import UserError
from tinylora.generation.types import Request, SamplingParams, is_integer


def check_requests(
    requests: Sequence[Request], *, vocabulary_size: int, context_length: int, adapter: Trained | None
) -> None:
    """Refuse what an engine cannot run.

    Raises: UserError, naming the request, for an empty prompt, a prompt that fills the context, a token id (of the
    prompt, forced, or biased) outside the vocabulary, a sample count or key out of range, parameters that are no
    SamplingParams, or an adapter vector without an adapter, of the wrong shape or not finite.
    """
    checked: set[int] = set()
    for index, request in enumerate(requests):
        _check(f"request {index}", request, vocabulary_size, context_length)
        if request.v is not None and id(request.v) not in checked:  # most requests of a batch bring the same tensor
            _check_vector(f"request {index}", request.v, adapter)
            checked.add(id(request.v))


def _check(name: str, request: Request, vocabulary_size: int, context_length: int) -> None:
    for what, ids in (("prompt_ids", request.prompt_ids), ("forced_ids", request.forced_ids)):
        if not isinstance(ids, tuple):
            raise UserError(f"{name} has {what} of type {type(ids).__name__}; give a tuple of token ids")
    for what, function in (("a should_stop", request.should_stop), ("an on_finished", request.on_finished)):
        if function is not None and not callable(function):
            raise UserError(f"{name} has {what} of type {type(function).__name__}; give a function")
    length = len(request.prompt_ids)
    if not length:
        raise UserError(f"{name} has an empty prompt; give at least one token")
    if length >= context_length:
        raise UserError(
            f"{name} has a prompt of {length} tokens and the model's context is {context_length}; shorten the prompt"
        )
    if not isinstance(request.params, SamplingParams):
        raise UserError(f"{name} has params of type {type(request.params).__name__}; give SamplingParams")
    biased = (token for token, _ in request.params.logit_bias)
    for token in (*request.prompt_ids, *request.forced_ids, *biased):
        if not (is_integer(token) and 0 <= token < vocabulary_size):
            raise UserError(
                f"{name} has token id {token}; allowed: 0 to {vocabulary_size - 1}; "
                "check that tokenizer and model belong together"
            )
    if not (is_integer(request.num_samples) and 1 <= request.num_samples < 2**32):
        raise UserError(f"{name} asks for {request.num_samples} samples; at least 1 is allowed, and below 2**32")
    if not (is_integer(request.key) and 0 <= request.key < 2**64):
        raise UserError(f"{name} has key {request.key}; allowed: integers at least 0 and below 2**64")


def _check_vector(name: str, v: Tensor, adapter: Trained | None) -> None:
    if adapter is None:
        raise UserError(f"{name} brings an adapter vector but the engine has no adapter attached")
    expected = adapter.shape
    if not isinstance(v, Tensor):
        raise UserError(f"{name} has a vector of type {type(v).__name__}; give a tensor of shape {expected}")
    if tuple(v.shape) != expected:
        raise UserError(f"{name} has a vector of shape {tuple(v.shape)}; allowed: {expected}")
    if not all_finite(v):
        raise UserError(f"{name} has an adapter vector with a number that is not finite")
