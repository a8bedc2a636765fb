"""Softmax attention over a tree of segments: each token sees its ancestors and its own segment up to itself.

Float32 throughout; what is cheap to compute again (weights, rotation) is not kept for the gradient.
Leaves out: how segments are laid out and grouped into blocks (packed.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class Block:
    """Segments of the token axis that attend together: all have the same ancestors, and lie one behind the other.

    Queries are the tokens start to stop; keys are those of the ancestors, then own_start to stop. `pad` (rows x
    longest) lays the queries out as a rectangle (index `tokens` of the axis = a row of zeros), `unpad` takes the real
    ones out of it; None where there is nothing to pad. `hidden` is True where a query must not see a key, over the last
    keys.
    """

    rows: int
    start: int
    stop: int
    own_start: int
    ancestors: tuple[tuple[int, int], ...]
    pad: Tensor | None
    unpad: Tensor | None
    hidden: Tensor
    """(queries, last keys) bool."""
    owners: Tensor | None = None
    """Of each row, whose v it goes by; None where all go by one."""


@dataclass(frozen=True, eq=False, slots=True)
class SharedKeys:
    """What a layer attends to that was computed before, with its derivative in every number of v."""

    keys: Tensor
    """(kv heads, tokens, 2 d): rotated keys beside values, float32."""
    tangents: Tensor
    """(numbers, kv heads, tokens, 2 d)."""


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotary positions of x (tokens, ..., d) in float32, by tables (tokens, d), into out."""
    half = x.shape[-1] // 2
    cos, sin = (table.view(len(table), *[1] * (x.dim() - 2), -1) for table in (cos, sin))
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])


class _Attention(torch.autograd.Function):
    """Softmax attention over a tree of segments, in float32, a block at a time.

    The CPU's flash kernel takes five times as long for the shapes of a GRPO batch, most of it in its backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, shift: Tensor | None, cos: Tensor, sin: Tensor,
        blocks: Sequence[Block], scale: float, behind: SharedKeys | None,
    ) -> Tensor:  # fmt: skip
        ctx.blocks, ctx.scale, ctx.behind = blocks, scale, behind
        ctx.num_rows = 0 if shift is None else len(shift)
        ctx.save_for_backward(q, k, v, cos, sin)
        queries, keys = _arranged(q, k, v, cos, sin, scale)
        tokens, num_heads, d = q.shape
        out = torch.empty(len(queries), tokens, queries.shape[2], dtype=torch.float32, device=q.device)
        for block in blocks:
            Q, KV = _block_inputs(block, queries, keys, d, behind)
            P = _weights(block, Q, KV[..., :d])
            rows = torch.bmm(P, KV[..., d:]).view(len(queries), -1, queries.shape[2])
            out[:, block.start : block.stop] = rows if block.unpad is None else rows.index_select(1, block.unpad)
        return out.transpose(0, 1).to(q.dtype, memory_format=torch.contiguous_format).reshape(tokens, num_heads * d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cos, sin = ctx.saved_tensors
        queries, keys = _arranged(q, k, v, cos, sin, ctx.scale)
        tokens, num_heads, d = q.shape
        num_kv = len(queries)
        grad_out = torch.zeros_like(queries)
        grad_out[:, :tokens] = grad.view(tokens, num_kv, -1).transpose(0, 1)
        grad_queries, grad_keys = torch.empty_like(queries[:, :tokens]), torch.zeros_like(keys[:, :tokens])
        behind: SharedKeys | None = ctx.behind
        grad_shift = None
        if behind is not None:
            grad_shift = torch.zeros(ctx.num_rows, len(behind.tangents), dtype=torch.float32, device=q.device)
        for block in ctx.blocks:
            Q, KV = _block_inputs(block, queries, keys, d, behind)
            dO = _rows(block, grad_out, d)
            P = _weights(block, Q, KV[..., :d])
            dKV = torch.empty_like(KV)
            dKV[..., d:] = torch.bmm(P.transpose(1, 2), dO)
            dP = torch.bmm(dO, KV[..., d:].transpose(1, 2))
            dS = torch.ops.aten._softmax_backward_data(dP, P, -1, torch.float32)
            dKV[..., :d] = torch.bmm(dS.transpose(1, 2), Q)
            dQ = torch.bmm(dS, KV[..., :d]).view(num_kv, -1, queries.shape[2])
            grad_queries[:, block.start : block.stop] = dQ if block.unpad is None else dQ.index_select(1, block.unpad)
            dKV = dKV.view(num_kv, block.rows, -1, 2 * d)
            at = 0
            for first, last in block.ancestors:
                above = dKV[:, :, at : at + last - first]
                if behind is None:
                    grad_keys[:, first:last] += above.sum(1)
                elif grad_shift is not None:
                    moves = behind.tangents[:, :, first:last].flatten(1)
                    grad_shift.index_add_(0, block.owners, above.transpose(0, 1).flatten(1) @ moves.T)
                at += last - first
            own = dKV[:, :, at:].reshape(num_kv, -1, 2 * d)
            grad_keys[:, block.own_start : block.stop] += (
                own if block.unpad is None else own.index_select(1, block.unpad)
            )
        rotated = torch.empty(tokens, num_heads, d, dtype=torch.float32, device=q.device)
        dq = grad_queries.transpose(0, 1).view(tokens, num_kv, -1, d).flatten(1, 2)
        _rotate(dq, cos * ctx.scale, -sin * ctx.scale, rotated)
        grad_q = rotated.to(q.dtype)
        rotated = torch.empty(tokens, num_kv, d, dtype=torch.float32, device=q.device)
        _rotate(grad_keys[..., :d].transpose(0, 1), cos, -sin, rotated)
        grad_v = grad_keys[..., d:].transpose(0, 1).to(v.dtype, memory_format=torch.contiguous_format)
        return grad_q, rotated.to(k.dtype), grad_v, grad_shift, None, None, None, None, None


def _arranged(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Queries (kv heads, tokens + 1, repeats x d) times scale, keys beside values (kv heads, tokens + 1, 2 d), float32.

    Rotated; the row behind the last token is zero.
    """
    tokens, num_heads, d = q.shape
    num_kv = k.shape[1]
    queries = torch.empty(num_kv, tokens + 1, num_heads // num_kv, d, dtype=torch.float32, device=q.device)
    queries[:, tokens] = 0
    _rotate(q.view(tokens, num_kv, -1, d), cos * scale, sin * scale, queries[:, :tokens].transpose(0, 1))
    keys = torch.empty(num_kv, tokens + 1, 2 * d, dtype=torch.float32, device=q.device)
    keys[:, tokens] = 0
    _rotate(k, cos, sin, keys[:, :tokens, :d].transpose(0, 1))
    keys[:, :tokens, d:] = v.transpose(0, 1)
    return queries.flatten(2), keys


def _rows(block: Block, x: Tensor, d: int) -> Tensor:
    """Of (kv heads, tokens + 1, repeats x d), the block's: (kv heads x rows, longest x repeats, d)."""
    picked = x[:, block.start : block.stop] if block.pad is None else x.index_select(1, block.pad)
    return picked.reshape(len(x) * block.rows, -1, d)


def _block_inputs(
    block: Block, queries: Tensor, keys: Tensor, d: int, behind: SharedKeys | None = None
) -> tuple[Tensor, Tensor]:
    above = keys if behind is None else behind.keys
    own = keys[:, block.own_start : block.stop] if block.pad is None else keys.index_select(1, block.pad)
    own = own.reshape(len(keys), block.rows, -1, 2 * d)
    shared = [above[:, a:b].unsqueeze(1).expand(-1, block.rows, -1, -1) for a, b in block.ancestors]
    KV = torch.cat([*shared, own], dim=2) if shared else own
    return _rows(block, queries, d), KV.flatten(0, 1)


def _weights(block: Block, Q: Tensor, K: Tensor) -> Tensor:
    scores = torch.bmm(Q, K.transpose(1, 2))
    num_queries, width = block.hidden.shape
    view = scores.view(len(scores), num_queries, -1, scores.shape[2])
    view[..., scores.shape[2] - width :].masked_fill_(block.hidden.unsqueeze(1), float("-inf"))
    return torch.softmax(scores, dim=-1)


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, blocks: Sequence[Block], scale: float,
    behind: SharedKeys | None = None, shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of q (tokens, heads, d) to k and v (tokens, kv heads, d), not yet rotated -> (tokens, heads x d).

    cos and sin (tokens, d) float32. Every token must be a query of exactly one block.
    With `behind` the ancestors of blocks are places in its keys. These move by `shift` (rows, numbers), which must be
    zero and is there for its gradient: that of each row through what it shares with others.
    """
    y: Tensor = _Attention.apply(q, k, v, shift, cos, sin, blocks, scale, behind)
    return y


def attention_with_tangents(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, blocks: Sequence[Block], scale: float
) -> tuple[Tensor, SharedKeys]:
    """`tree_attention` and its derivative: q, k, v (1 + numbers, tokens, heads, d), the value first, then its tangents.

    Returns the same for the output, (1 + numbers, tokens, heads x d), and the keys for those behind. No gradient.
    """
    arranged = [_arranged(*one, cos, sin, scale) for one in zip(q, k, v, strict=True)]
    queries, keys = arranged[0]
    _, tokens, num_heads, d = q.shape
    out = torch.empty(len(q), len(queries), tokens, queries.shape[2], dtype=torch.float32, device=q.device)

    def put(which: int, block: Block, rows: Tensor) -> None:
        rows = rows.view(len(queries), -1, queries.shape[2])
        out[which, :, block.start : block.stop] = rows if block.unpad is None else rows.index_select(1, block.unpad)

    for block in blocks:
        Q, KV = _block_inputs(block, queries, keys, d)
        K, V = KV[..., :d], KV[..., d:]
        P = _weights(block, Q, K)
        put(0, block, torch.bmm(P, V))
        for number, tangent in enumerate(arranged[1:], start=1):
            dQ, dKV = _block_inputs(block, *tangent, d)
            dS = torch.bmm(dQ, K.transpose(1, 2)).baddbmm_(Q, dKV[..., :d].transpose(1, 2))
            dP = torch.ops.aten._softmax_backward_data(dS, P, -1, torch.float32)  # the Jacobian is symmetric
            put(number, block, torch.bmm(dP, V).baddbmm_(P, dKV[..., d:]))
    y = out.transpose(1, 2).to(q.dtype, memory_format=torch.contiguous_format).reshape(len(q), tokens, num_heads * d)
    return y, SharedKeys(keys, torch.stack([tangent[1] for tangent in arranged[1:]]))
