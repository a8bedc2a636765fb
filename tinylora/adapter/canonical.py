"""Canonical weights: the bf16 rounding of a weight, in which every load of one checkpoint agrees."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tinylora.adapter.quantised import dequantised, quantisation
from tinylora.errors import UserError

Weight = nn.Module | Callable[[], Tensor]
"""A linear map, or a function that gives its weight as (out, in) in any floating dtype."""


def canonical_weight(module: nn.Module) -> Tensor:
    """Weight of a linear map as (out, in) float32 on the CPU, holding values rounded to bf16 (nearest, ties to even).

    A transformers Conv1D stores (in, out) and is transposed. Raises: UserError for another kind of module, a packed
    weight, or a value that is not finite.
    """
    return finite_float32(round_to_bf16(raw_weight(module)))


def raw_weight(module: nn.Module) -> Tensor:
    """The weight of a linear map as it was loaded, seen as (out, in); of a quantised one its dequantised values.

    Raises: UserError if there is none to see.
    """
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise UserError(f"only nn.Linear and Conv1D can be adapted, got {type(module).__name__}; choose other targets")
    if quantisation(module):
        return dequantised(module)
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def round_to_bf16(weight: Tensor) -> Tensor:
    """A weight (out, in) of any floating dtype as contiguous bf16 on the CPU; float64 goes through float32.

    Raises: UserError for a packed weight.
    """
    if not weight.dtype.is_floating_point or weight.dim() != 2:
        raise UserError(
            f"the weight is packed ({weight.dtype}, shape {tuple(weight.shape)}); load the model dequantised"
        )
    if weight.dtype == torch.float64:
        weight = weight.float()
    return weight.detach().to(device="cpu", dtype=torch.bfloat16).contiguous()


def rounded_weight(weight: Weight) -> Tensor:
    """The canonical values (out, in) as bf16, not checked for being finite. Raises: UserError for a packed weight."""
    return round_to_bf16(raw_weight(weight) if isinstance(weight, nn.Module) else weight())


def finite_float32(rounded: Tensor) -> Tensor:
    """bf16 values as float32. Raises: UserError if one is not finite."""
    weight = rounded.float()
    if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
        raise UserError("a weight holds a value that is not finite in bf16; check the model's download")
    return weight
