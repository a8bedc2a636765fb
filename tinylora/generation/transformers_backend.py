"""Rollouts through the forward pass of a transformers model: any causal LM, and the reference for faster engines.

Each prompt is computed once and its cache shared by its samples; rows that have finished are dropped from the batch.
Leaves out: continuous batching (the next batch starts when the last one is done) and paged caches.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tinylora.adapter.trained import Trained
from tinylora.errors import UserError
from tinylora.generation.requests import check_requests
from tinylora.generation.sampler import draw_tokens
from tinylora.generation.sequences import Sequence, collect, make_sequences
from tinylora.generation.types import Completion, Request
from tinylora.models.prefill import can_select, prefill, with_cache

DROP_SHARE = 0.8
"""Finished rows are dropped once fewer than this share of the batch is still running: each drop copies the cache."""


class TransformersEngine:
    """generate(requests) -> completions, by a plain decode loop over a transformers model."""

    name = "transformers"
    arithmetic = "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        context_length: int,
        pad_token_id: int = 0,
        adapter: Trained | None = None,
        max_batch_rows: int = 128,
    ) -> None:
        if max_batch_rows < 1:
            raise UserError(f"generation.max_batch_rows must be at least 1, got {max_batch_rows}")
        self.model = model
        self.context_length = context_length
        self.pad_token_id = pad_token_id
        self.adapter = adapter
        self.max_batch_rows = max_batch_rows
        if not can_select(model):
            raise UserError(
                f"{type(model).__name__} keeps a recurrent state, whose rows cannot be chosen one by one; no rollout "
                "engine here covers that"
            )

    def room_for_reply(self, prompt_length: int) -> int:
        """The context, as this engine keeps no budget of memory."""
        return self.context_length

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Completions of all requests, ordered by (request, sample).

        Raises: UserError, before anything is sampled, for a request that `check_requests` refuses; GenerationError, at
        the end and with the completions of the other requests, for logits that are not finite.
        """
        requests = list(requests)
        check_requests(
            requests,
            vocabulary_size=int(self.model.get_input_embeddings().weight.shape[0]),
            context_length=self.context_length,
            adapter=self.adapter,
        )
        rows = make_sequences(requests)
        # Like lengths side by side: less padding. A stable sort keeps the samples of one prompt together.
        rows.sort(key=lambda row: (len(row.request.prompt_ids), row.request_index))
        with torch.inference_mode():
            for start in range(0, len(rows), self.max_batch_rows):
                self._run(rows[start : start + self.max_batch_rows])
        return collect(rows)

    def _vectors(self, rows: list[Sequence]) -> Tensor | None:
        """One v for all rows if they agree, else one per row (rows, groups, u)."""
        vectors = [row.request.v for row in rows]
        if all(v is vectors[0] for v in vectors):
            return vectors[0]
        assert self.adapter is not None
        zeros = self.adapter.zeros()
        return torch.stack([zeros if v is None else v.to(zeros) for v in vectors])

    @contextmanager
    def _using(self, rows: list[Sequence]) -> Iterator[Tensor | None]:
        """The model under the rows' adapter vectors; yields them."""
        if self.adapter is None:
            yield None
            return
        vectors = self._vectors(rows)
        with self.adapter.using(vectors):
            yield vectors

    def _run(self, rows: list[Sequence]) -> None:
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
            alive = [i for i, row in enumerate(running) if not row.is_finished]
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
                    **with_cache(self.model, batch.cache),
                ).logits[:, -1]

    def _draw(self, rows: list[Sequence], logits: Tensor) -> Tensor:
        """Draw the next token of every row still running; rows that have finished are fed a token nobody reads."""
        running = [i for i, row in enumerate(rows) if not row.is_finished]
        if len(running) < len(rows):
            index = torch.tensor(running, device=logits.device)
            drawn = draw_tokens(logits[index], [rows[i] for i in running])
            tokens = torch.full((len(rows),), self.pad_token_id, device=logits.device)
            tokens[index] = drawn.tokens
        else:
            drawn = draw_tokens(logits, rows)
            tokens = drawn.tokens
        numbers = zip(drawn.token_ids, drawn.logprobs, drawn.sampling_logprobs, strict=True)
        for i, (token, logprob, sampling_logprob) in zip(running, numbers, strict=True):
            if not rows[i].error:
                rows[i].append(token, logprob, sampling_logprob, self.context_length)
        return tokens
