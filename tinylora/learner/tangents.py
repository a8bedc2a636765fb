"""Forward mode over what completions share: hidden states, keys and values with their derivative in every number of v.

A prompt's gradient is asked for once for each completion behind it. Backward that is one pass a completion; forward it
is one tangent a number of v, whatever the number of completions.
Leaves out: the completions themselves, which go backward (scores.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tinylora.learner.attention import SharedKeys, attention_with_tangents
from tinylora.learner.frozen_ops import FrozenLinear, add_product
from tinylora.learner.layout import Layout
from tinylora.learner.packed import PackedForward


@dataclass(frozen=True, eq=False, slots=True)
class SharedPart:
    """What `forward_with_tangents` found; tangents by numbers of v, groups x u, flattened."""

    keys: list[SharedKeys]
    """Of each layer."""
    hidden: Tensor
    """(1 + numbers, tokens, width): what leaves the last layer, then its tangents."""


@torch.no_grad()
def forward_with_tangents(packed: PackedForward, layout: Layout, v: Tensor) -> SharedPart:
    """The forward pass over an axis under v (groups, u), with all groups x u tangents."""
    first, ropes, blocks = packed.begin(layout)
    arch = packed.architecture
    numbers = v.numel()
    x = torch.zeros(1 + numbers, *first.shape, dtype=first.dtype, device=first.device)
    x[0] = first
    mixing: Sequence[Tensor] = ()
    if packed.adapted:
        own = torch.zeros(1 + numbers, *v.shape, dtype=packed.P.dtype, device=packed.P.device)
        own[0] = v
        own[1:].view(numbers, numbers).fill_diagonal_(1.0)
        mixing = torch.einsum("nmi,mijk->mnjk", own[:, packed.tie_groups], packed.P).unbind()
    norm = lambda x, module: _norm(x, module, arch.norm_eps, arch.norm_adds_one)  # noqa: E731
    keys = []
    for layer, parts in packed.by_layer(mixing):
        of = layer.layer
        q, k, value = _linears(norm(x, of.input_norm), layer.qkv, parts[0])
        q, k, value = (one.view(*one.shape[:2], -1, arch.head_dim) for one in (q, k, value))
        if of.q_norm is not None:
            q = norm(q, of.q_norm)
        if of.k_norm is not None:
            k = norm(k, of.k_norm)
        attended, shared = attention_with_tangents(q, k, value, *ropes[of.rope], blocks[of.window], arch.scale)
        keys.append(shared)
        (y,) = _linears(attended, layer.o, parts[1])
        x = x + (y if of.attention_out_norm is None else norm(y, of.attention_out_norm))
        gate, up = _linears(norm(x, of.mlp_norm), layer.gate_up, parts[2])
        (y,) = _linears(_gated(gate, up, of.activation), layer.down, parts[3])
        x = x + (y if of.mlp_out_norm is None else norm(y, of.mlp_out_norm))
    return SharedPart(keys, x)


def _linears(x: Tensor, maps: Sequence[FrozenLinear], mixing: Sequence[Tensor]) -> list[Tensor]:
    """`frozen_ops.linears` of x (1 + numbers, tokens, in); `mixing` holds R and its tangents, (1 + numbers, r, r)."""
    flat = x.flatten(0, 1)
    outputs = []
    changes = iter(mixing)
    for one in maps:
        y = nn.functional.linear(flat, one.weight)
        if one.bias is not None:
            y[: x.shape[1]] += one.bias
        if one.layer is not None and mixing:
            R = next(changes)
            h = nn.functional.linear(flat.to(one.A.dtype), one.A).view(*x.shape[:2], -1)
            mixed = h @ R[0].T
            mixed[1:] += h[0] @ R[1:].transpose(1, 2)
            add_product(y, mixed.flatten(0, 1), one.B_pieces)
        outputs.append(y.view(*x.shape[:2], -1))
    return outputs


def _norm(x: Tensor, norm: nn.Module, eps: float, adds_one: bool) -> Tensor:
    """norm(x) over the last axis and its tangents."""
    weight = cast(Tensor, norm.weight).detach().float()
    value, tangent = x[0].float(), x[1:].float()
    scale = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    unit = value * scale
    tangent = (tangent - unit * (unit * tangent).mean(-1, keepdim=True)) * scale
    y = torch.empty_like(x)
    y[0] = norm(x[0])
    y[1:] = tangent * (weight + 1 if adds_one else weight)
    return y


def _gated(gate: Tensor, up: Tensor, activation: nn.Module) -> Tensor:
    """activation(gate) * up and its tangents."""
    with torch.enable_grad():
        leaf = gate[0].detach().requires_grad_()
        active = activation(leaf)
        (slope,) = torch.autograd.grad(active.sum(), leaf)
    active = active.detach()
    y = torch.empty_like(up)
    y[0] = active * up[0]
    y[1:] = slope * up[0] * gate[1:] + active * up[1:]
    return y
