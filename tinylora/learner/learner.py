"""Log-probs of completions under v, with gradient: what the loss is made of.

Each distinct prompt is computed once and its keys and values are shared by its completions, gradient included; so is
what all prompts begin with. That is the same mathematics as one full forward a completion (`shared_prompts=False`, the
reference), with fewer products. Models that `describe` covers go through packed.py, without padding; others through
their own forward, padded.
Leaves out: the loss itself (objective.py) and who is trained on what (grpo.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tinylora.adapter.attach import AttachedAdapter
from tinylora.adapter.trained import Trained
from tinylora.errors import UserError
from tinylora.learner.layout import shared_prefix
from tinylora.learner.packed import PackedForward
from tinylora.models.architecture import Unsupported, describe
from tinylora.models.prefill import can_select, prefill, with_cache


@dataclass(frozen=True, slots=True)
class Row:
    """One completion to score: the group whose prompt it completes, and its tokens (stop token included)."""

    group: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


class _Size:
    """Tokens that a batch takes, kept up to date as rows join it."""

    def __init__(self, shared_prompts: bool, padded: bool, shared_prefix: int) -> None:
        """shared_prefix: tokens at the beginning of every prompt that a batch computes once."""
        self.shared_prompts, self.padded, self.shared_prefix = shared_prompts, padded, shared_prefix
        self.prompts: set[Any] = set()
        self.prompt_tokens = shared_prefix
        self.num_rows = self.tokens = self.width = self.length = 0

    def add(self, row: Row) -> int:
        """Take the row in; returns the batch's tokens."""
        self.num_rows += 1
        self.tokens += len(row.token_ids)
        self.width = max(self.width, len(row.prompt_ids))
        self.length = max(self.length, len(row.token_ids))
        key: Any = self.num_rows if not self.shared_prompts else row.group if self.padded else row.prompt_ids
        if key not in self.prompts:
            self.prompts.add(key)
            self.prompt_tokens += len(row.prompt_ids) - self.shared_prefix
        if self.padded:
            return len(self.prompts) * self.width + self.num_rows * self.length
        return self.prompt_tokens + self.tokens


def micro_batches(
    rows: Sequence[Row], max_tokens: int, *, shared_prompts: bool = True, padded: bool | None = None
) -> Iterator[list[int]]:
    """Indices of rows, a batch at a time, so that prompt and completion tokens stay within max_tokens.

    `padded` says whether padding counts; None means where prompts are not shared (`Learner.padded` tells). A shared
    prompt counts once, else once a row; so does, without padding, what all prompts begin with.

    Rows of a group stay together where they fit, groups of like length come together. One row that is longer than
    max_tokens is a batch of its own. The order depends on lengths, and on what prompts share: equal rows give equal
    batches.
    """
    padded = not shared_prompts if padded is None else padded
    longest: dict[int, int] = {}
    for row in rows:
        longest[row.group] = max(longest.get(row.group, 0), len(row.token_ids))
    order = sorted(range(len(rows)), key=lambda i: (longest[rows[i].group], len(rows[i].prompt_ids), rows[i].group, i))
    prefix = shared_prefix(list({row.prompt_ids for row in rows})) if shared_prompts and not padded else 0
    batch: list[int] = []
    size = _Size(shared_prompts, padded, prefix)
    for index in order:
        if size.add(rows[index]) > max_tokens and batch:
            yield batch
            batch, size = [], _Size(shared_prompts, padded, prefix)
            size.add(rows[index])
        batch.append(index)
    if batch:
        yield batch


class Learner:
    """Scores completions with the training model. Frozen weights never get a gradient; only v does."""

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: Trained,
        *,
        temperature: float = 1.0,
        pad_token_id: int = 0,
        shared_prompts: bool = True,
        checkpointing: bool = False,
        packed: bool = True,
    ) -> None:
        """`packed=False` keeps a model that packed.py covers on the padded path, as a reference.

        Raises: UserError if `checkpointing` finds nothing to recompute.
        """
        self.model = model
        self.adapter = adapter
        self.temperature = temperature
        self.pad_token_id = pad_token_id
        self.packed: PackedForward | None = None
        if shared_prompts and packed and isinstance(adapter, AttachedAdapter):
            with suppress(Unsupported):
                self.packed = PackedForward(describe(model), checkpointing=checkpointing)
        # A layer computed again in the backward pass must not write to a cache: then each row is one full forward.
        self.shared_prompts = self.packed is not None or (shared_prompts and not checkpointing and can_select(model))
        self.checkpointing = checkpointing
        if checkpointing and self.packed is None and not self._layers():
            raise UserError(
                f"train.gradient_checkpointing: {type(model).__name__} has no layers to recompute; turn it off"
            )

    @property
    def padded(self) -> bool:
        """Whether padding is computed too, which `micro_batches` then counts."""
        return self.packed is None

    def logprobs(self, rows: Sequence[Row], v: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-probs at the temperature and the mask of real tokens, both (rows, longest completion), float32 and bool.

        What stands at padded positions is 0. Differentiable in v where v requires a gradient; v None is the base model.
        With a v for each row, (rows, groups, u), rows share nothing.
        """
        mask = torch.zeros(len(rows), max(len(row.token_ids) for row in rows), dtype=torch.bool)
        targets = torch.full(mask.shape, self.pad_token_id)
        for i, row in enumerate(rows):
            mask[i, : len(row.token_ids)] = True
            targets[i, : len(row.token_ids)] = torch.tensor(row.token_ids)
        device = self.model.device
        mask, targets = mask.to(device), targets.to(device)
        one_vector = v is None or v.dim() == 2
        with self.adapter.using(v):
            if self.packed is not None:
                return self._unpadded(rows, v if v is None else v.to(self.adapter.zeros())), mask
            score = self._shared if self.shared_prompts and one_vector else self._full
            with self._recomputing(v):
                return score(rows, targets, mask).masked_fill(~mask, 0.0), mask

    def _unpadded(self, rows: Sequence[Row], v: Tensor | None) -> Tensor:
        assert self.packed is not None
        prompts, completions = [row.prompt_ids for row in rows], [row.token_ids for row in rows]
        return pad_sequence(self.packed.logprobs(prompts, completions, v, self.temperature), batch_first=True)

    def _layers(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]

    @contextmanager
    def _recomputing(self, v: Tensor | None) -> Iterator[None]:
        """With `checkpointing`, keep only what enters each layer; the backward pass computes the layer again, under v.

        transformers' own switch does nothing in eval mode, and train mode would turn dropout on.
        """
        layers = self._layers() if self.checkpointing and torch.is_grad_enabled() else []

        def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with self.adapter.using(v):  # when the backward pass comes here, logprobs has long put v back
                    return forward(*args, **kwargs)

            return lambda *args, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)

        own = [layer.__dict__.get("forward") for layer in layers]  # of hooks that somebody else has set
        for layer in layers:
            layer.forward = wrapped(layer.forward)
        try:
            yield
        finally:
            for layer, forward in zip(layers, own, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

    def _pick(self, logits: Tensor, targets: Tensor) -> Tensor:
        scores = logits.float() / self.temperature
        return scores.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(scores, dim=-1)

    def _prompts(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Prompt tokens and mask, padded on the left, (prompts, width)."""
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_token_id)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        return ids.to(self.model.device), mask.to(self.model.device)

    def _shared(self, rows: Sequence[Row], targets: Tensor, mask: Tensor) -> Tensor:
        groups = {row.group: row.prompt_ids for row in rows}
        place = {group: i for i, group in enumerate(groups)}
        batch = prefill(self.model, list(groups.values()), self.pad_token_id)
        batch.select(torch.tensor([place[row.group] for row in rows], device=targets.device))
        head = self._pick(batch.logits, targets[:, 0]).unsqueeze(1)
        if targets.shape[1] == 1:
            return head
        rest = self.model(
            input_ids=targets[:, :-1],
            attention_mask=torch.cat([batch.mask, mask[:, :-1].long()], dim=1),
            position_ids=batch.position.unsqueeze(1) + torch.arange(1, targets.shape[1], device=targets.device),
            **with_cache(self.model, batch.cache),
        ).logits
        return torch.cat([head, self._pick(rest, targets[:, 1:])], dim=1)

    def _full(self, rows: Sequence[Row], targets: Tensor, mask: Tensor) -> Tensor:
        ids, prompt_mask = self._prompts([row.prompt_ids for row in rows])
        attention = torch.cat([prompt_mask, mask.long()], dim=1)
        positions = (attention.cumsum(-1) - 1).clamp_min(0)
        keep = torch.arange(ids.shape[1] - 1, attention.shape[1] - 1, device=ids.device)
        logits = self.model(
            input_ids=torch.cat([ids, targets], dim=1), attention_mask=attention, position_ids=positions,
            use_cache=False, logits_to_keep=keep,
        ).logits  # fmt: skip
        return self._pick(logits, targets)
