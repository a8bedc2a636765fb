"""What goes into an engine and what comes out. The engine knows no task, no reward, no text."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from torch import Tensor

from tinylora.errors import UserError

SMALLEST, LARGEST = 1e-6, 1e6
"""Bounds of the numbers that logits are divided by: beyond them float32 overflows on logits of usual size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to draw tokens. temperature 0 is greedy; log-probs are then those at temperature 1.

    The logits of a position go through, in the order and with the definitions of transformers (5.23,
    `GenerationMixin._get_logits_processor`): logit_bias, repetition_penalty, temperature, top_k, top_p, min_p. The last
    three change nothing when greedy, as they always keep the best token.
    Raises: UserError for a value of the wrong type or out of range.
    """

    temperature: float = 1.0
    """0 is greedy; otherwise 1e-6 to 1e6."""
    max_new_tokens: int = 64
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    top_k: int = 0
    """Keep the k most probable tokens, and those that tie with the last of them; 0 is off."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose probability is at least p, and those that tie with the last
    of them; above 0 and at most 1 (off)."""
    min_p: float = 0.0
    """Keep the tokens with at least this share of the best one's probability, 0 (off) to below 1."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens already in prompt or completion are divided by this, negative ones multiplied."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what to add to its logit), each token once."""

    def __post_init__(self) -> None:
        temperature = _real("temperature", self.temperature)
        if temperature != 0 and not SMALLEST <= temperature <= LARGEST:
            raise UserError(
                f"temperature must be a finite number, 0 (greedy) or {SMALLEST:g} to {LARGEST:g}, got {temperature}"
            )
        if _integer("max_new_tokens", self.max_new_tokens) < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= _integer("seed", self.seed) < 2**64:
            raise UserError(f"seed must be at least 0 and below 2**64, got {self.seed}")
        if not isinstance(self.stop_token_ids, tuple) or not all(_is_token(t) for t in self.stop_token_ids):
            raise UserError(f"stop_token_ids must be a tuple of token ids, 0 or more each, got {self.stop_token_ids!r}")
        if _integer("top_k", self.top_k) < 0:
            raise UserError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < _real("top_p", self.top_p) <= 1:
            raise UserError(f"top_p must be above 0 and at most 1 (off), got {self.top_p}")
        if not 0 <= _real("min_p", self.min_p) < 1:
            raise UserError(f"min_p must be at least 0 (off) and below 1, got {self.min_p}")
        if not SMALLEST <= _real("repetition_penalty", self.repetition_penalty) <= LARGEST:
            raise UserError(
                f"repetition_penalty must be above 0 ({SMALLEST:g} to {LARGEST:g}; 1 is off), "
                f"got {self.repetition_penalty}"
            )
        self._check_logit_bias()

    def _check_logit_bias(self) -> None:
        if not isinstance(self.logit_bias, tuple) or not all(
            isinstance(pair, tuple) and len(pair) == 2 and _is_token(pair[0]) for pair in self.logit_bias
        ):
            raise UserError(f"logit_bias must be a tuple of pairs (token id, bias), got {self.logit_bias!r}")
        for token, bias in self.logit_bias:
            if not abs(_real(f"the logit_bias of token {token}", bias)) <= LARGEST:
                raise UserError(f"the logit_bias of token {token} must be a finite number, at most 1e6, got {bias}")
        tokens = [token for token, _ in self.logit_bias]
        twice = [token for i, token in enumerate(tokens) if token in tokens[:i]]
        if twice:
            raise UserError(f"logit_bias names token {twice[0]} twice; give each token one bias")

    @property
    def is_plain(self) -> bool:
        """Whether nothing beyond temperature is done, so that `logprob` and `sampling_logprob` are the same number.

        Training needs this: its objective takes the log-probs at the temperature for those drawn from.
        """
        return (
            self.top_k == 0
            and self.top_p == 1
            and self.min_p == 0
            and self.repetition_penalty == 1
            and not self.logit_bias
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to complete `num_samples` times.

    `key` names the request in the random draws: draw(params.seed, key, sample, position), so a completion does not
    depend on what else is in the batch. `v` is the adapter vector, (groups, u) float32; None is the base model.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    num_samples: int = 1
    key: int = 0
    v: Tensor | None = None
    should_stop: Callable[[list[int]], bool] | None = None
    on_finished: Callable[[], object] | None = None
    """Called as each of its completions ends, for those who watch."""
    forced_ids: tuple[int, ...] = ()
    """Tokens to take instead of drawing, one a position; their log-probs are reported. For probes and for scoring."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One sampled completion; the stop token, if one was drawn, is the last of `token_ids`."""

    request_index: int
    sample_index: int
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[float, ...]
    """log-probability of each token under the model at the run's temperature: what the learner computes too."""
    sampling_logprobs: tuple[float, ...]
    """log-probability under the distribution really drawn from; differs if a sampler does more than temperature.

    -inf for a forced token that the sampler rules out. When greedy: under what the best token was taken from.
    """


def is_integer(value: Any) -> bool:
    """Whether this is an integer number, Python's or NumPy's; True and False are none."""
    return isinstance(value, (int, Integral)) and not isinstance(value, bool)


def _is_token(value: Any) -> bool:
    return is_integer(value) and value >= 0


def _integer(name: str, value: Any) -> int:
    if not is_integer(value):
        raise UserError(f"{name} must be an integer, got {value!r}")
    return int(value)


def _real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{name} must be a number, got {value!r}")
    return float(value)
