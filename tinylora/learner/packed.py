"""A forward pass over the real tokens of a GRPO batch only: one flat token axis, every distinct prompt on it once.

Products, norms and activations run over (tokens, width), attention over blocks of segments of like length.
Leaves out: how a batch lies on the axis (layout.py), and models that `describe` does not cover (learner.py has the
padded path for them).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tinylora.learner.attention import Block, SharedKeys, tree_attention
from tinylora.learner.frozen_ops import FrozenLinear, gated, linears, rms_norm, token_logprobs
from tinylora.learner.layout import Layout, lay_out, lay_out_apart
from tinylora.models.architecture import Architecture, DecoderLayer

BLOCK_SCORES = 2**21
"""Attention scores (float32) of one block, all heads, unless a single query has more."""
_SMALL_BLOCK = 2**19
"""Up to here, a block takes rows of any length: padding costs less than another block."""

_MIN_SPAN = 32
"""Fewest queries of a span."""


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
                    owner = torch.tensor([first.owner], device=device)
                    blocks.append(Block(1, start, stop, first.start, first.ancestors, None, None, hidden, owner))
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
            owners, last = torch.tensor([one.owner for one in rows], device=device), rows[-1].stop
            blocks.append(Block(len(rows), first.start, last, first.start, first.ancestors, pad, unpad, hidden, owners))
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
        """Log-probs of each completion's tokens behind its prompt, float32, differentiable in v.

        v is (groups, u), or (completions, groups, u) with one for each, which then share nothing; None is the base.
        """
        layout = (lay_out_apart if v is not None and v.dim() == 3 else lay_out)(prompts, completions)
        x = self.hidden_states(layout, v)
        places = torch.tensor([place for one in layout.scored for place in one], dtype=torch.long, device=x.device)
        return self.pick(x.index_select(0, places), completions, temperature)

    def pick(self, x: Tensor, completions: Sequence[tuple[int, ...]], temperature: float) -> list[Tensor]:
        """Log-probs of completions from the hidden states (tokens, width) that predict them, one behind the other."""
        arch = self.architecture
        targets = torch.tensor([token for one in completions for token in one], dtype=torch.long, device=x.device)
        x = rms_norm(x, arch.norm, arch.norm_eps, arch.norm_adds_one)
        found = token_logprobs(x, arch.head.weight.detach(), targets, temperature)
        return list(found.split([len(one) for one in completions]))

    def begin(self, layout: Layout) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], dict[int, list[Block]]]:
        """What enters the first layer (tokens, width), rotary tables by name, attention blocks by window."""
        arch = self.architecture
        device = arch.device
        x: Tensor = arch.embed(torch.tensor(layout.token_ids, dtype=torch.long, device=device))
        ropes = {
            name: (cos.float(), sin.float())
            for name, (cos, sin) in arch.rope_tables(layout.positions().to(device)).items()
        }
        blocks = {
            window: attention_blocks(layout, arch.num_heads, window, device)
            for window in dict.fromkeys(layer.window for layer in arch.layers)
        }
        return x, ropes, blocks

    def by_layer(self, of_each: Sequence[Tensor]) -> Iterator[tuple[_Layer, list[Sequence[Tensor]]]]:
        """Layers with what belongs to their adapted maps: of q, k, v, of o, of gate and up, of down."""
        at = 0
        for layer in self.layers:
            parts: list[Sequence[Tensor]] = []
            for maps in (layer.qkv, layer.o, layer.gate_up, layer.down):
                count = sum(one.layer is not None for one in maps) if of_each else 0
                parts.append(of_each[at : at + count])
                at += count
            yield layer, parts

    def hidden_states(
        self, layout: Layout, v: Tensor | None, shared: Sequence[SharedKeys] = (), shift: Tensor | None = None
    ) -> Tensor:
        """What leaves the last layer, (tokens, width). `shared` of each layer and `shift` as in `tree_attention`."""
        x, ropes, blocks = self.begin(layout)
        mixing: Sequence[Tensor] = ()
        owners = None
        if self.adapted and v is not None:
            own = v.to(self.P.dtype)[..., self.tie_groups, :]
            mixing = torch.einsum("...mi,mijk->m...jk", own, self.P).unbind()
            owners = layout.owners().to(x.device) if v.dim() == 3 else None
        for index, (layer, parts) in enumerate(self.by_layer(mixing)):
            attention = (ropes[layer.layer.rope], blocks[layer.layer.window], shared[index] if shared else None, shift)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._layer, layer, x, parts, owners, *attention, use_reentrant=False)
            else:
                x = self._layer(layer, x, parts, owners, *attention)
        return x

    def _layer(
        self,
        layer: _Layer,
        x: Tensor,
        mixing: Sequence[Sequence[Tensor]],
        owners: Tensor | None,
        rope: tuple[Tensor, Tensor],
        blocks: Sequence[Block],
        shared: SharedKeys | None,
        shift: Tensor | None,
    ) -> Tensor:
        arch, parts = self.architecture, layer.layer
        norm = lambda x, module: rms_norm(x, module, arch.norm_eps, arch.norm_adds_one)  # noqa: E731
        q, k, v = linears(norm(x, parts.input_norm), layer.qkv, mixing[0], owners)
        q, k, v = (one.view(len(x), -1, arch.head_dim) for one in (q, k, v))
        if parts.q_norm is not None:
            q = norm(q, parts.q_norm)
        if parts.k_norm is not None:
            k = norm(k, parts.k_norm)
        attended = tree_attention(q, k, v, *rope, blocks, arch.scale, shared, shift)
        (y,) = linears(attended, layer.o, mixing[1], owners)
        x = x + (y if parts.attention_out_norm is None else norm(y, parts.attention_out_norm))
        gate, up = linears(norm(x, parts.mlp_norm), layer.gate_up, mixing[2], owners)
        (y,) = linears(gated(gate, up, parts.activation), layer.down, mixing[3], owners)
        return x + (y if parts.mlp_out_norm is None else norm(y, parts.mlp_out_norm))
