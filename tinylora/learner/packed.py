"""A forward pass over the real tokens of a GRPO batch only: one flat token axis, every distinct prompt on it once.

The axis is a tree of segments: what all prompts begin with, then what is left of each prompt, then the completions; a
token sees its ancestors and its own segment up to itself. Products, norms and activations run over (tokens, width).
Leaves out: models that `describe` does not cover (learner.py has the padded path for them).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tinylora.learner.frozen_ops import (
    Block,
    FrozenLinear,
    gated,
    linears,
    rms_norm,
    token_logprobs,
    tree_attention,
)
from tinylora.models.architecture import Architecture, DecoderLayer
from tinylora.models.prefill import MIN_SHARED, common_prefix_length

BLOCK_SCORES = 2**21
"""Attention scores (float32) of one block, all heads, unless a single query has more."""
_SMALL_BLOCK = 2**19
"""Up to here, a block takes rows of any length: padding costs less than another block."""

_MIN_SPAN = 32
"""Fewest queries of a span."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start to stop of the axis, which see the segments `ancestors` (start, stop) before their own."""

    start: int
    stop: int
    ancestors: tuple[tuple[int, int], ...]

    @property
    def depth(self) -> int:
        """Tokens before this segment: the position of its first one."""
        return sum(stop - start for start, stop in self.ancestors)


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch on the flat axis."""

    token_ids: list[int]
    segments: list[list[Segment]]
    """Segments with the same ancestors, one behind the other, longest first."""
    scored: list[list[int]]
    """Of each completion, the place on the axis whose hidden state predicts each of its tokens."""


def shared_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that distinct prompts begin with, 0 where they are too few for a segment of their own."""
    length = common_prefix_length(prompts) if len(prompts) > 1 else 0
    return length if length >= MIN_SHARED else 0


def lay_out(prompts: Sequence[tuple[int, ...]], completions: Sequence[tuple[int, ...]]) -> Layout:
    """Put completions behind their prompts (one for each completion, equal ones count once).

    A completion's last token predicts nothing and is left out. Order: by length, then by place in the batch.
    Raises: ValueError for an empty prompt, behind which nothing can be scored.
    """
    if not all(prompts):
        raise ValueError("a completion needs a prompt of at least one token")
    distinct = sorted(dict.fromkeys(prompts), key=len, reverse=True)
    shared = shared_prefix(distinct)
    token_ids: list[int] = []

    def append(tokens: tuple[int, ...], ancestors: tuple[tuple[int, int], ...]) -> Segment:
        token_ids.extend(tokens)
        return Segment(len(token_ids) - len(tokens), len(token_ids), ancestors)

    segments: list[list[Segment]] = []
    above: tuple[tuple[int, int], ...] = ()
    if shared:
        head = append(distinct[0][:shared], ())
        segments.append([head])
        above = ((head.start, head.stop),)
    roots = [append(prompt[shared:], above) for prompt in distinct]
    segments.append(roots)
    scored: list[list[int]] = [[] for _ in completions]
    for prompt, root in zip(distinct, roots, strict=True):
        mine = [i for i, other in enumerate(prompts) if other == prompt]
        siblings = []
        for i in sorted(mine, key=lambda i: -len(completions[i])):
            one = append(completions[i][:-1], (*above, (root.start, root.stop)))
            scored[i] = [root.stop - 1, *range(one.start, one.stop)][: len(completions[i])]
            if one.stop > one.start:
                siblings.append(one)
        if siblings:
            segments.append(siblings)
    return Layout(token_ids, segments, scored)


def _hidden(num_queries: int, first: int, depth: int, window: int, device: torch.device) -> Tensor:
    """What queries at own places first, first + 1, ... must not see: over their own keys, or all with a window."""
    query = torch.arange(first, first + num_queries, device=device).unsqueeze(1)
    key = torch.arange(first if not window else -depth, first + num_queries, device=device)
    hidden = key > query
    return hidden | (query - key >= window) if window else hidden


def attention_blocks(layout: Layout, num_heads: int, window: int, device: torch.device) -> list[Block]:
    """Segments grouped so that padding is little, blocks are few, and no block has more than `BLOCK_SCORES` scores.

    A segment too long for one block is cut into spans of queries. `window` as in DecoderLayer.
    """
    blocks: list[Block] = []
    total = len(layout.token_ids)
    for siblings in layout.segments:
        depth = siblings[0].depth
        at = 0
        while at < len(siblings):
            first = siblings[at]
            longest = first.stop - first.start
            seen = window if 0 < window < depth + longest else 0
            scores = num_heads * longest * (depth + longest)
            if scores > BLOCK_SCORES:
                span = max(_MIN_SPAN, BLOCK_SCORES // (num_heads * (depth + longest)))
                for begin in range(0, longest, span):
                    end = min(longest, begin + span)
                    hidden = _hidden(end - begin, begin, depth, seen, device)
                    start, stop = first.start + begin, first.start + end
                    blocks.append(Block(1, start, stop, first.start, first.ancestors, None, None, hidden))
                at += 1
                continue
            rows = [first]
            for other in siblings[at + 1 :]:
                wasteful = other.stop - other.start < 0.7 * longest and len(rows) * scores > _SMALL_BLOCK
                if wasteful or (len(rows) + 1) * scores > BLOCK_SCORES:
                    break
                rows.append(other)
            at += len(rows)
            lengths = torch.tensor([one.stop - one.start for one in rows])
            pad = unpad = None
            if int(lengths.min()) < longest:
                starts = torch.tensor([one.start for one in rows])
                offsets = torch.arange(longest)
                real = offsets < lengths.unsqueeze(1)
                pad = torch.where(real, starts.unsqueeze(1) + offsets, total).flatten().to(device)
                unpad = real.flatten().nonzero().squeeze(1).to(device)
            hidden = _hidden(longest, 0, depth, seen, device)
            blocks.append(
                Block(len(rows), first.start, rows[-1].stop, first.start, first.ancestors, pad, unpad, hidden)
            )
    return blocks


class _Layer:
    """A DecoderLayer, its maps made ready."""

    def __init__(self, layer: DecoderLayer) -> None:
        self.layer = layer
        self.qkv = [FrozenLinear(one) for one in (layer.q, layer.k, layer.v)]
        self.o = [FrozenLinear(layer.o)]
        self.gate_up = [FrozenLinear(one) for one in (layer.gate, layer.up)]
        self.down = [FrozenLinear(layer.down)]


class PackedForward:
    """Log-probs over an Architecture by the packed axis. Weights and factors are read at construction."""

    def __init__(self, architecture: Architecture, *, checkpointing: bool = False) -> None:
        self.architecture = architecture
        self.checkpointing = checkpointing
        self.layers = [_Layer(layer) for layer in architecture.layers]
        self.adapted = [
            one
            for layer in self.layers
            for one in (*layer.qkv, *layer.o, *layer.gate_up, *layer.down)
            if one.layer is not None
        ]
        modules = [one.layer for one in self.adapted if one.layer is not None]
        if modules:
            self.tie_groups = torch.tensor([module.tie_group for module in modules], device=architecture.device)
            self.P = torch.stack([module.P for module in modules])

    def logprobs(
        self,
        prompts: Sequence[tuple[int, ...]],
        completions: Sequence[tuple[int, ...]],
        v: Tensor | None,
        temperature: float,
    ) -> list[Tensor]:
        """Log-probs of each completion's tokens behind its prompt, float32, differentiable in v (groups, u).

        v None is the base model.
        """
        arch = self.architecture
        device = arch.device
        layout = lay_out(prompts, completions)
        x: Tensor = arch.embed(torch.tensor(layout.token_ids, device=device))
        positions = torch.zeros(len(layout.token_ids), dtype=torch.long)
        for siblings in layout.segments:
            for one in siblings:
                positions[one.start : one.stop] = torch.arange(one.depth, one.depth + one.stop - one.start)
        ropes = {
            name: (cos.float(), sin.float()) for name, (cos, sin) in arch.rope_tables(positions.to(device)).items()
        }
        blocks = {
            window: attention_blocks(layout, arch.num_heads, window, device)
            for window in dict.fromkeys(layer.window for layer in arch.layers)
        }
        mixing: list[Tensor] = []
        if self.adapted and v is not None:
            mixing = list(torch.einsum("mi,mijk->mjk", v.to(self.P.dtype)[self.tie_groups], self.P).unbind())
        at = 0
        for layer in self.layers:
            counts = [
                sum(one.layer is not None for one in maps) for maps in (layer.qkv, layer.o, layer.gate_up, layer.down)
            ]
            parts = []
            for count in counts:
                parts.append(mixing[at : at + count])
                at += count
            rope = ropes[layer.layer.rope]
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._layer, layer, x, parts, rope, blocks[layer.layer.window], use_reentrant=False)
            else:
                x = self._layer(layer, x, parts, rope, blocks[layer.layer.window])
        places = torch.tensor([place for one in layout.scored for place in one], dtype=torch.long, device=device)
        targets = torch.tensor([token for one in completions for token in one], dtype=torch.long, device=device)
        x = rms_norm(x.index_select(0, places), arch.norm, arch.norm_eps, arch.norm_adds_one)
        found = token_logprobs(x, arch.head.weight.detach(), targets, temperature)
        return list(found.split([len(one) for one in completions]))

    def _layer(
        self,
        layer: _Layer,
        x: Tensor,
        mixing: Sequence[Sequence[Tensor]],
        rope: tuple[Tensor, Tensor],
        blocks: Sequence[Block],
    ) -> Tensor:
        arch, parts = self.architecture, layer.layer
        norm = lambda x, module: rms_norm(x, module, arch.norm_eps, arch.norm_adds_one)  # noqa: E731
        q, k, v = linears(norm(x, parts.input_norm), layer.qkv, mixing[0])
        q, k, v = (one.view(len(x), -1, arch.head_dim) for one in (q, k, v))
        if parts.q_norm is not None:
            q = norm(q, parts.q_norm)
        if parts.k_norm is not None:
            k = norm(k, parts.k_norm)
        (y,) = linears(tree_attention(q, k, v, *rope, blocks, arch.scale), layer.o, mixing[1])
        x = x + (y if parts.attention_out_norm is None else norm(y, parts.attention_out_norm))
        gate, up = linears(norm(x, parts.mlp_norm), layer.gate_up, mixing[2])
        (y,) = linears(gated(gate, up, parts.activation), layer.down, mixing[3])
        return x + (y if parts.mlp_out_norm is None else norm(y, parts.mlp_out_norm))
