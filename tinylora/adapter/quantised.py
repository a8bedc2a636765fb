"""Linear maps whose frozen weight is quantised, by bitsandbytes or torchao: which they are, and what they hold.

The map itself stays as it is and computes its own output; TinyLoRA needs of it the shape and the dequantised values,
from which basis and fingerprint come. Nothing is ever quantised anew. The libraries are told by the type of the weight,
so that neither has to be installed for a plain model.
"""

import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tinylora.errors import UserError

KINDS = ("bnb-4bit", "bnb-8bit", "torchao-int8", "torchao-int4")
"""What model.quantization may name besides "none"."""
_TORCHAO = {"Int8Tensor": "torchao-int8", "IntxUnpackedToInt8Tensor": "torchao-int4"}


def quantisation(module: nn.Module) -> str:
    """How the weight of a linear map is quantised, one of KINDS, "torchao" for another of its formats; "" if not."""
    weight: Any = getattr(module, "weight", None)
    kind = type(weight)
    if kind.__name__ == "Params4bit":
        return "bnb-4bit"
    if kind.__name__ == "Int8Params":
        return "bnb-8bit"
    return _TORCHAO.get(kind.__name__, "torchao") if kind.__module__.startswith("torchao.") else ""


def quantisation_of(model: nn.Module) -> str:
    """The same of the first quantised map of a model."""
    return next((kind for module in model.modules() if (kind := quantisation(module))), "")


def dequantised(module: nn.Module) -> Tensor:
    """The values (out, in) of a quantised map in float32, where they are; what they are rounded to is the caller's.

    Of bitsandbytes' formats they are multiplied out in float32 whatever the model's dtype; torchao keeps its scales in
    that dtype, and multiplies in it. Raises: UserError for a format that cannot be read.
    """
    held: Any = module
    weight = held.weight
    with torch.no_grad():
        kind = quantisation(module)
        if kind == "bnb-4bit":
            from bitsandbytes.functional import dequantize_4bit

            state = copy.copy(weight.quant_state)
            if state is None:
                raise UserError("the weight is not quantised yet; move the model to its device first")
            _refuse_repacked(state)
            state.dtype = torch.float32
            return dequantize_4bit(weight.data, state).float()
        if kind == "bnb-8bit":
            scales = weight.SCB if getattr(weight, "SCB", None) is not None else held.state.SCB
            if scales is None:
                raise UserError("the weight is not quantised yet; move the model to its device first")
            return weight.data.float() * (scales.float() / 127).unsqueeze(1)
        if not hasattr(weight, "dequantize"):
            raise UserError(f"weights of type {type(weight).__name__} cannot be read; take {', '.join(KINDS)}")
        return weight.dequantize().detach().float()


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear map, however it stores its weight."""
    if quantisation(module):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    weight: Any = module.weight
    first, second = weight.shape
    return (int(second), int(first)) if isinstance(module, Conv1D) else (int(first), int(second))


def stored_bytes(weight: Any) -> int:
    """Bytes of a parameter with the scales that go with it."""
    kind = type(weight)
    if kind.__module__.startswith("torchao."):
        parts = [getattr(weight, name, None) for name in ("qdata", "scale", "zero_point")]
    elif kind.__name__ == "Params4bit":
        state = weight.quant_state
        parts = [weight.data, state.absmax, state.code] if state is not None else [weight.data]
    else:
        parts = [weight, getattr(weight, "SCB", None)]
    return sum(part.numel() * part.element_size() for part in parts if isinstance(part, Tensor))


def keep_differentiable(model: nn.Module) -> None:
    """Let bitsandbytes' maps compute what their gradient is the gradient of, whether the model trains or samples.

    4 bits: it packs frozen weights in eval mode, in place, for the CPU's bfloat16 kernels at the first forward pass,
    and those have no backward pass: what comes out of them has no gradient, and says nothing of it. 8 bits: in eval
    mode the inputs are rounded to 8 bits, too, with outliers found over the whole batch, which no backward pass knows;
    on the CPU the product of train mode is taken instead, with the dequantised weight.
    Raises: UserError if 4-bit weights of this model have been packed already.
    """
    module: Any
    for module in model.modules():
        if quantisation(module) == "bnb-4bit":
            _refuse_repacked(module.weight.quant_state)
            module.support_avx512bf16_for_cpu = False
        if quantisation(module) == "bnb-8bit" and module.weight.device.type == "cpu":
            module.forward = MethodType(_as_in_training, module)


def _as_in_training(module: Any, x: Tensor) -> Tensor:
    """A Linear8bitLt's forward pass as in train mode, in which it is left as it was found."""
    before = module.training
    module.training = True  # of this map alone, which has no other use for it
    try:
        found: Tensor = type(module).forward(module, x)
    finally:
        module.training = before
    return found


def _refuse_repacked(state: Any) -> None:
    if getattr(state, "packing_format_for_cpu", False):
        raise UserError(
            "bitsandbytes has packed this model's weights for inference on the CPU, where they have no gradient; load "
            "the model anew and put the adapter on it before its first forward pass"
        )
