"""One completion in the making, and how finished ones are handed back: what every engine shares."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from tinylora.errors import UserError
from tinylora.generation.types import Completion, Request


class GenerationError(UserError):
    """Some requests failed while they ran; the others are complete, in `completions`."""

    def __init__(self, message: str, completions: list[Completion]) -> None:
        super().__init__(message)
        self.completions = completions
        """Of all requests without an error, ordered by (request, sample)."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of one request, token by token. It is finished by a reason or by an error."""

    request_index: int
    sample_index: int
    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["", "stop", "length"] = ""
    error: str = ""
    """Why this sequence ended without a completion: the end of a sentence that names the request. Empty when fine."""

    @property
    def is_finished(self) -> bool:
        """Whether no token is to be drawn any more."""
        return bool(self.finish_reason or self.error)

    @property
    def num_tokens(self) -> int:
        """Length of prompt and completion so far."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    def token_budget(self, context_length: int) -> int:
        """Most tokens the completion can have."""
        return min(self.request.params.max_new_tokens, context_length - len(self.request.prompt_ids))

    def append(self, token: int, logprob: float, sampling_logprob: float, context_length: int) -> None:
        """Add one token; sets finish_reason if it was the last."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.sampling_logprobs.append(sampling_logprob)
        should_stop = self.request.should_stop
        if token in self.request.params.stop_token_ids or (should_stop is not None and should_stop(self.token_ids)):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.token_budget(context_length):
            self.finish_reason = "length"
        if self.finish_reason and self.request.on_finished is not None:
            self.request.on_finished()

    def forced_token(self) -> int:
        """The token to take next instead of drawing, or -1."""
        forced, position = self.request.forced_ids, len(self.token_ids)
        return forced[position] if position < len(forced) else -1

    def completion(self) -> Completion:
        """The finished completion."""
        assert self.finish_reason and not self.error
        return Completion(
            request_index=self.request_index,
            sample_index=self.sample_index,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            logprobs=tuple(self.logprobs),
            sampling_logprobs=tuple(self.sampling_logprobs),
        )


def make_sequences(requests: Iterable[Request]) -> list[Sequence]:
    """One sequence for each sample of each request, ordered by (request, sample)."""
    return [
        Sequence(index, sample_index, request)
        for index, request in enumerate(requests)
        for sample_index in range(request.num_samples)
    ]


def collect(sequences: Iterable[Sequence]) -> list[Completion]:
    """The completions, ordered by (request, sample).

    Raises: GenerationError, with the completions of all other requests, if a sequence has an error: a request counts as
    failed if one of its samples is.
    """
    ordered = sorted(sequences, key=lambda sequence: (sequence.request_index, sequence.sample_index))
    failed: dict[int, str] = {}
    for sequence in ordered:
        if sequence.error:
            failed.setdefault(sequence.request_index, sequence.error)
    completions = [sequence.completion() for sequence in ordered if sequence.request_index not in failed]
    if failed:
        index, error = next(iter(failed.items()))
        others = f" (the first of {len(failed)} requests that failed)" if len(failed) > 1 else ""
        raise GenerationError(f"request {index}{others}: {error}", completions)
    return completions
