"""Rollouts through the forward pass of a transformers model: any causal LM, and the reference for faster engines.

Each prompt is computed once and its cache shared by its samples; rows that have finished are dropped from the batch.
Leaves out: continuous batching (the next batch starts when the last one is done), paged caches, and samplers beyond
temperature.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tinylora.adapter.attach import AttachedAdapter
from tinylora.adapter.projection import draw_uniforms
from tinylora.errors import UserError
from tinylora.generation.prefill import prefill
from tinylora.generation.sampler import sample
from tinylora.generation.types import Completion, Request

DROP_SHARE = 0.8
"""Finished rows are dropped once fewer than this share of the batch is still running: each drop copies the cache."""


@dataclass
class _Row:
    request_index: int
    sample_index: int
    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""

    def append(self, token: int, logprob: float, context_length: int) -> None:
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        params = self.request.params
        if token in params.stop_token_ids or (
            self.request.should_stop is not None and self.request.should_stop(self.token_ids)
        ):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= min(params.max_new_tokens, context_length - len(self.request.prompt_ids)):
            self.finish_reason = "length"

    def forced_token(self) -> int:
        """The token to take next instead of drawing, or -1."""
        forced, position = self.request.forced_ids, len(self.token_ids)
        return forced[position] if position < len(forced) else -1

    def completion(self) -> Completion:
        assert self.finish_reason in ("stop", "length")
        logprobs = tuple(self.logprobs)
        return Completion(
            request_index=self.request_index,
            sample_index=self.sample_index,
            token_ids=tuple(self.token_ids),
            finish_reason="stop" if self.finish_reason == "stop" else "length",
            logprobs=logprobs,
            sampling_logprobs=logprobs,
        )


class TransformersEngine:
    """generate(requests) -> completions, by a plain decode loop over a transformers model."""

    name = "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        context_length: int,
        pad_token_id: int = 0,
        adapter: AttachedAdapter | None = None,
        max_batch_rows: int = 128,
    ) -> None:
        if max_batch_rows < 1:
            raise UserError(f"generation.max_batch_rows must be at least 1, got {max_batch_rows}")
        self.model = model
        self.context_length = context_length
        self.pad_token_id = pad_token_id
        self.adapter = adapter
        self.max_batch_rows = max_batch_rows

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions of all requests, ordered by (request, sample).

        Raises: UserError, before anything is sampled, for an empty prompt, a prompt that fills the context, a token id
        outside the vocabulary, a sample count or key out of range, or an adapter vector without an adapter, of the
        wrong shape or not finite; and for non-finite logits.
        """
        for index, request in enumerate(requests):
            self._check(index, request)
        rows = [
            _Row(index, sample_index, request)
            for index, request in enumerate(requests)
            for sample_index in range(request.num_samples)
        ]
        # Like lengths side by side: less padding. A stable sort keeps the samples of one prompt together.
        rows.sort(key=lambda row: (len(row.request.prompt_ids), row.request_index))
        with torch.inference_mode():
            for start in range(0, len(rows), self.max_batch_rows):
                self._run(rows[start : start + self.max_batch_rows])
        return [row.completion() for row in sorted(rows, key=lambda row: (row.request_index, row.sample_index))]

    def _check(self, index: int, request: Request) -> None:
        length = len(request.prompt_ids)
        if not length:
            raise UserError(f"request {index} has an empty prompt; give at least one token")
        if length >= self.context_length:
            raise UserError(
                f"request {index} has a prompt of {length} tokens and the model's context is {self.context_length}; "
                "shorten the prompt"
            )
        vocabulary = int(self.model.get_input_embeddings().weight.shape[0])
        outside = [token for token in request.prompt_ids + request.forced_ids if not 0 <= token < vocabulary]
        if outside:
            raise UserError(
                f"request {index} has token id {outside[0]}; allowed: 0 to {vocabulary - 1}; "
                "check that tokenizer and model belong together"
            )
        if request.num_samples < 1:
            raise UserError(f"request {index} asks for {request.num_samples} samples; at least 1 is allowed")
        if not 0 <= request.key < 2**64:
            raise UserError(f"request {index} has key {request.key}; allowed: at least 0 and below 2**64")
        if request.v is not None:
            if self.adapter is None:
                raise UserError(f"request {index} brings an adapter vector but the engine has no adapter attached")
            expected = (self.adapter.num_groups, self.adapter.config.u)
            if tuple(request.v.shape) != expected:
                raise UserError(f"request {index} has a vector of shape {tuple(request.v.shape)}; allowed: {expected}")
            if not torch.isfinite(request.v).all():
                raise UserError(f"request {index} has an adapter vector with a number that is not finite")

    def _vectors(self, rows: Sequence[_Row]) -> Tensor | None:
        """One v for all rows if they agree, else one per row (rows, groups, u)."""
        vectors = [row.request.v for row in rows]
        if all(v is vectors[0] for v in vectors):
            return vectors[0]
        assert self.adapter is not None
        zeros = self.adapter.zeros()
        return torch.stack([zeros if v is None else v.to(zeros) for v in vectors])

    @contextmanager
    def _using(self, rows: Sequence[_Row]) -> Iterator[Tensor | None]:
        """The model under the rows' adapter vectors; yields them."""
        if self.adapter is None:
            yield None
            return
        vectors = self._vectors(rows)
        with self.adapter.using(vectors):
            yield vectors

    def _run(self, rows: list[_Row]) -> None:
        starts = [i for i, row in enumerate(rows) if i == 0 or row.request_index != rows[i - 1].request_index]
        prompts = [rows[i] for i in starts]
        with self._using(prompts) as vectors:
            batch = prefill(
                self.model,
                [row.request.prompt_ids for row in prompts],
                self.pad_token_id,
                share_prefix=vectors is None or vectors.dim() == 2,
            )
        owner = torch.tensor([bisect_right(starts, i) - 1 for i in range(len(rows))], device=self.model.device)
        batch.select(owner)
        running = rows
        while True:
            tokens = self._draw(running, batch.logits)
            alive = [i for i, row in enumerate(running) if not row.finish_reason]
            if not alive:
                return
            if len(alive) < DROP_SHARE * len(running):
                keep = torch.tensor(alive, device=self.model.device)
                batch.select(keep)
                tokens = tokens[keep]
                running = [running[i] for i in alive]
            # A row that has finished may stay in the batch past the end of the context: hold its position inside.
            batch.position = (batch.position + 1).clamp_max(self.context_length - 1)
            batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(running), 1)], dim=1)
            with self._using(running):
                batch.logits = self.model(
                    input_ids=tokens.unsqueeze(1),
                    attention_mask=batch.mask,
                    position_ids=batch.position.unsqueeze(1),
                    past_key_values=batch.cache,
                    use_cache=True,
                ).logits[:, -1]

    def _draw(self, rows: Sequence[_Row], logits: Tensor) -> Tensor:
        """Draw the next token of every row still running; rows that have finished are fed a token nobody reads."""
        tokens = torch.full((len(rows),), self.pad_token_id, device=logits.device)
        by_temperature: dict[float, list[int]] = {}
        for i, row in enumerate(rows):
            if not row.finish_reason:
                by_temperature.setdefault(row.request.params.temperature, []).append(i)
        for temperature, members in by_temperature.items():
            index = torch.tensor(members, device=logits.device)
            uniform = None
            if temperature > 0:
                drawn = draw_uniforms(
                    [rows[i].request.params.seed for i in members],
                    [rows[i].request.key for i in members],
                    [rows[i].sample_index for i in members],
                    [len(rows[i].token_ids) for i in members],
                )
                uniform = torch.as_tensor(drawn, dtype=torch.float64, device=logits.device)
            forced = None
            if any(rows[i].request.forced_ids for i in members):
                forced = torch.tensor([rows[i].forced_token() for i in members], device=logits.device)
            own = logits if len(members) == len(rows) else logits[index]
            chosen, logprobs = sample(own, temperature, uniform, forced)
            tokens[index] = chosen
            for i, token, logprob in zip(members, chosen.tolist(), logprobs.tolist(), strict=True):
                rows[i].append(token, logprob, self.context_length)
        return tokens
