"""The few operations of a decoder whose weights are frozen, each with the smallest backward pass there is.

No gradient of a weight is ever formed: what reaches v goes through R (r, r) of each adapted map, for which a map keeps
(tokens, r) numbers instead of its input. What is cheap to compute again (norms, activations, attention weights) is not
kept. Float32 work: norms, everything of rank r; products with the weights stay in their dtype.
Leaves out: attention (attention.py), and in which order a model uses them (packed.py).
"""

from collections.abc import Sequence
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


def add_product(y: Tensor, h: Tensor, pieces: Tensor) -> None:
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
    def forward(
        ctx: Any, x: Tensor, maps: Sequence[FrozenLinear], owners: Tensor | None, *mixing: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = [nn.functional.linear(x, one.weight, one.bias) for one in maps]
        adapted = [i for i, one in enumerate(maps) if one.layer is not None] if mixing else []
        ctx.maps, ctx.adapted, ctx.owners = maps, adapted, owners
        if adapted:
            A = torch.cat([maps[i].A for i in adapted])
            projected = nn.functional.linear(x.to(A.dtype), A)
            for h, i, R in zip(projected.split(mixing[0].shape[-1], dim=1), adapted, mixing, strict=True):
                mixed = h @ R.T if owners is None else (R[owners] * h.unsqueeze(1)).sum(-1)
                add_product(outputs[i], mixed, maps[i].B_pieces)
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
            return grad_x, None, None
        projected, *mixing = ctx.saved_tensors
        grad_mixing: list[Tensor | None] = []
        parts = projected.split(mixing[0].shape[-1], dim=1)
        back: list[Tensor] = []
        for h, i, R in zip(parts, ctx.adapted, mixing, strict=True):
            gB = nn.functional.linear(grads[i].to(h.dtype), ctx.maps[i].Bt)
            if ctx.owners is None:
                grad_mixing.append(gB.T @ h)
                back.append(gB @ R)
            else:
                each = gB.unsqueeze(2) * h.unsqueeze(1)
                grad_mixing.append(torch.zeros_like(R).index_add_(0, ctx.owners, each))
                back.append((gB.unsqueeze(2) * R[ctx.owners]).sum(1))
        if grad_x is not None:
            for gBR, i in zip(back, ctx.adapted, strict=True):
                add_product(grad_x, gBR, ctx.maps[i].A_pieces)
        return grad_x, None, None, *grad_mixing


def linears(
    x: Tensor, maps: Sequence[FrozenLinear], mixing: Sequence[Tensor], owners: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Outputs (tokens, out_i) of several maps of x (tokens, in); `mixing` holds R (r, r) of the adapted ones in
    order, or nothing for the base. With `owners` (tokens,) each R is (rows, r, r), and a token takes its owner's.

    Differentiable in x and R. Same rounding as AdaptedLinear: the base's output, then the sum, to the base's dtype.
    """
    found: tuple[Tensor, ...] = _Linears.apply(x, maps, owners, *mixing)
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
