"""The few operations of a decoder whose weights are frozen, each with the smallest backward pass there is.

No gradient of a weight is ever formed: what reaches v goes through R (r, r) of each adapted map, for which a map keeps
(tokens, r) numbers instead of its input. What is cheap to compute again (norms, activations, attention weights) is not
kept. Float32 work: norms, rotation, attention, everything of rank r; products with the weights stay in their dtype.
Leaves out: in which order a model uses them (packed.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tinylora.adapter.layer import AdaptedLinear


def _pieces(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """(r, n) -> (3 r, n): high, low and high parts in a narrow dtype, or the factor itself where it fits."""
    if dtype == factor.dtype:
        return factor.contiguous()
    high = factor.to(dtype)
    return torch.cat([high, (factor - high.to(factor.dtype)).to(dtype), high])


def _add_product(y: Tensor, h: Tensor, pieces: Tensor) -> None:
    """y += h factor, added up in float32 and rounded once to y's dtype, without a float32 copy of y.

    In a narrow dtype each number is the sum of two: h1 f1 + h1 f2 + h2 f1 leaves out about 2^-16 of the product.
    """
    if h.dtype != y.dtype:
        high = h.to(y.dtype)
        h = torch.cat([high, high, (h - high.to(h.dtype)).to(y.dtype)], dim=1)
    y.addmm_(h, pieces)


class FrozenLinear:
    """A linear map of an Architecture, plain or adapted, as the functions here take it."""

    @staticmethod
    def base(module: nn.Module) -> nn.Linear:
        """The nn.Linear itself."""
        return cast(nn.Linear, module.base if isinstance(module, AdaptedLinear) else module)

    def __init__(self, module: nn.Module) -> None:
        base = self.base(module)
        self.weight: Tensor = base.weight.detach()
        self.bias: Tensor | None = None if base.bias is None else base.bias.detach()
        self.layer = module if isinstance(module, AdaptedLinear) else None
        if self.layer is not None:
            # Rows of B^T lie one behind the other: the narrow product g B is five times faster so than by columns.
            self.A, self.Bt = self.layer.A, self.layer.B.T.contiguous()
            self.A_pieces = _pieces(self.A, self.weight.dtype)
            self.B_pieces = _pieces(self.Bt, self.weight.dtype)


class _Linears(torch.autograd.Function):
    """x -> W_i x + b_i + B_i R_i A_i x for several maps of one x, which is read once for all A_i."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, maps: Sequence[FrozenLinear], *mixing: Tensor) -> tuple[Tensor, ...]:
        outputs = [nn.functional.linear(x, one.weight, one.bias) for one in maps]
        adapted = [i for i, one in enumerate(maps) if one.layer is not None] if mixing else []
        ctx.maps, ctx.adapted = maps, adapted
        if adapted:
            A = torch.cat([maps[i].A for i in adapted])
            projected = nn.functional.linear(x.to(A.dtype), A)
            for h, i, R in zip(projected.split(len(mixing[0]), dim=1), adapted, mixing, strict=True):
                _add_product(outputs[i], h @ R.T, maps[i].B_pieces)
            ctx.save_for_backward(projected, *mixing)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            grad_x = grads[0] @ ctx.maps[0].weight
            for g, one in zip(grads[1:], ctx.maps[1:], strict=True):
                grad_x.addmm_(g, one.weight)
        if not ctx.adapted:
            return grad_x, None
        projected, *mixing = ctx.saved_tensors
        grad_mixing: list[Tensor | None] = []
        parts = projected.split(len(mixing[0]), dim=1)
        back: list[Tensor] = []
        for h, i, R in zip(parts, ctx.adapted, mixing, strict=True):
            gB = nn.functional.linear(grads[i].to(h.dtype), ctx.maps[i].Bt)
            grad_mixing.append(gB.T @ h)
            back.append(gB @ R)
        if grad_x is not None:
            for gBR, i in zip(back, ctx.adapted, strict=True):
                _add_product(grad_x, gBR, ctx.maps[i].A_pieces)
        return grad_x, None, *grad_mixing


def linears(x: Tensor, maps: Sequence[FrozenLinear], mixing: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Outputs (tokens, out_i) of several maps of x (tokens, in); `mixing` holds R (r, r) of the adapted ones in
    order, or nothing for the base.

    Differentiable in x and R. Same rounding as AdaptedLinear: the base's output, then the sum, to the base's dtype.
    """
    found: tuple[Tensor, ...] = _Linears.apply(x, maps, *mixing)
    return found


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.Module, eps: float, adds_one: bool) -> Tensor:
        ctx.norm, ctx.eps, ctx.adds_one = norm, eps, adds_one
        ctx.save_for_backward(x)
        y: Tensor = norm(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        weight = ctx.norm.weight.detach().float()
        g = grad.float() * (weight + 1 if ctx.adds_one else weight)
        n = x.float()
        scale = torch.rsqrt(torch.linalg.vector_norm(n, dim=-1, keepdim=True).square() / n.shape[-1] + ctx.eps)
        n = n * scale
        g -= n * ((g * n).sum(-1, keepdim=True) / n.shape[-1])
        return g.mul_(scale).to(x.dtype), None, None, None


def rms_norm(x: Tensor, norm: nn.Module, eps: float, adds_one: bool) -> Tensor:
    """norm(x) over the last axis, keeping nothing but x for its gradient."""
    y: Tensor = _RMSNorm.apply(x, norm, eps, adds_one)
    return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: nn.Module) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        y: Tensor = activation(gate)
        return y.mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = ctx.activation(leaf)
        (grad_gate,) = torch.autograd.grad(active, leaf, grad * up)
        return grad_gate, active.detach().mul_(grad), None


def gated(gate: Tensor, up: Tensor, activation: nn.Module) -> Tensor:
    """activation(gate) * up, computing the activation again for its gradient."""
    y: Tensor = _Gated.apply(gate, up, activation)
    return y


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
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, blocks: Sequence[Block], scale: float
    ) -> Tensor:
        ctx.blocks, ctx.scale = blocks, scale
        ctx.save_for_backward(q, k, v, cos, sin)
        queries, keys = _arranged(q, k, v, cos, sin, scale)
        tokens, num_heads, d = q.shape
        out = torch.empty(len(queries), tokens, queries.shape[2], dtype=torch.float32, device=q.device)
        for block in blocks:
            Q, KV = _block_inputs(block, queries, keys, d)
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
        for block in ctx.blocks:
            Q, KV = _block_inputs(block, queries, keys, d)
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
                grad_keys[:, first:last] += dKV[:, :, at : at + last - first].sum(1)
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
        return grad_q, rotated.to(k.dtype), grad_v, None, None, None, None


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


def _block_inputs(block: Block, queries: Tensor, keys: Tensor, d: int) -> tuple[Tensor, Tensor]:
    own = keys[:, block.own_start : block.stop] if block.pad is None else keys.index_select(1, block.pad)
    own = own.reshape(len(keys), block.rows, -1, 2 * d)
    shared = [keys[:, a:b].unsqueeze(1).expand(-1, block.rows, -1, -1) for a, b in block.ancestors]
    KV = torch.cat([*shared, own], dim=2) if shared else own
    return _rows(block, queries, d), KV.flatten(0, 1)


def _weights(block: Block, Q: Tensor, K: Tensor) -> Tensor:
    scores = torch.bmm(Q, K.transpose(1, 2))
    num_queries, width = block.hidden.shape
    view = scores.view(len(scores), num_queries, -1, scores.shape[2])
    view[..., scores.shape[2] - width :].masked_fill_(block.hidden.unsqueeze(1), float("-inf"))
    return torch.softmax(scores, dim=-1)


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, blocks: Sequence[Block], scale: float
) -> Tensor:
    """Attention of q (tokens, heads, d) to k and v (tokens, kv heads, d), not yet rotated -> (tokens, heads x d).

    cos and sin (tokens, d) float32. Every token must be a query of exactly one block.
    """
    y: Tensor = _Attention.apply(q, k, v, cos, sin, blocks, scale)
    return y


CHUNK_BYTES = 64 * 2**20
"""Logits held at a time, in the model's dtype, as long as that leaves `CHUNK_ROWS` rows."""
CHUNK_ROWS = (64, 256)
"""Fewest and most rows whose logits are held at a time."""
CACHED_ROWS = 16
"""Rows of a chunk that are float32 at a time."""


def chunk_rows(weight: Tensor) -> int:
    """Rows whose logits are held at a time under an output head (vocabulary, hidden)."""
    fewest, most = CHUNK_ROWS
    return max(fewest, min(most, CHUNK_BYTES // (weight.shape[0] * weight.element_size())))


class _TokenLogprobs(torch.autograd.Function):
    """The gradient of one log-prob in its hidden state is g (W[target] - p W) / T: all but g is known going forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
        found = torch.empty(len(x), dtype=torch.float32, device=x.device)
        slope = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        size = chunk_rows(weight)
        for start in range(0, len(x), size):
            chunk = x[start : start + size]
            logits = nn.functional.linear(chunk, weight)
            wanted = targets[start : start + size].unsqueeze(1)
            for first in range(0, len(chunk), CACHED_ROWS):
                rows = slice(first, first + CACHED_ROWS)
                scores = logits[rows].float()
                if temperature != 1.0:
                    scores = scores / temperature
                scores = torch.log_softmax(scores, dim=-1)
                picked = scores.gather(1, wanted[rows])
                found[start + first : start + first + len(picked)] = picked.squeeze(1)
                if slope is not None:
                    pull = scores.exp_().neg_()
                    pull.scatter_(1, wanted[rows], -torch.expm1(picked))
                    logits[rows] = pull.div_(temperature) if temperature != 1.0 else pull
            if slope is not None:
                torch.mm(logits, weight, out=slope[start : start + size])
        if slope is not None:
            ctx.save_for_backward(slope)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope.float() * grad.unsqueeze(1)).to(slope.dtype), None, None, None


def token_logprobs(x: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Log-probs (n,) float32 of targets (n,) under softmax(x W^T / temperature), x (n, hidden), W (vocabulary, hidden).

    Logits in the weight's dtype, everything behind them in float32. Only `chunk_rows` rows of logits exist at a time,
    whatever n.
    """
    found: Tensor = _TokenLogprobs.apply(x, weight, targets, temperature)
    return found
