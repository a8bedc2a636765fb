"""What a method costs, from shapes alone: trained numbers, bytes of its file, memory of its state and activations."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from tinylora.config.method import THROUGH_PEFT, MethodConfig
from tinylora.methods.bottleneck import OUTPUTS
from tinylora.methods.build import FEEDFORWARD

STATE_COPIES = 16
"""Arrays of all trained numbers that a run holds at its peak, in float32: v, its gradient, Adam's two, the best v, what
the model computes with and its gradient, a clone for the engine, and four of them twice while a checkpoint is written.
"""
HEADER_BYTES = 4096
"""Of an adapter file, besides its numbers: the recipe."""


def trained_numbers(method: MethodConfig, shapes: Mapping[str, tuple[int, int]], parameters: int) -> int:
    """How many numbers the method trains. `shapes`: (out, in) of the target modules by path; `parameters`: of the base.

    Not for tinylora, whose count is that of its tie groups.
    """
    r = method.rank
    if method.name == "full":
        return parameters
    if method.name == "lora-xs":
        return r * r * len(shapes)
    if method.name == "adapter":
        ends = [out for path, (out, _) in shapes.items() if _name(path) in OUTPUTS]
        return sum(2 * r * out + r + out for out in ends)
    if method.name == "ia3":
        return sum(inner if _name(path) in FEEDFORWARD else out for path, (out, inner) in shapes.items())
    if method.name == "vera":
        return sum(r + out for out, _ in shapes.values())
    return sum(r * (out + inner) + (out if method.name == "dora" else 0) for out, inner in shapes.values())


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def file_bytes(numbers: int) -> int:
    """Bytes of adapter.safetensors."""
    return 4 * numbers + HEADER_BYTES


def state_bytes(numbers: int) -> int:
    """Memory of the trained numbers and all that goes with them."""
    return 4 * STATE_COPIES * numbers


def padded_bytes_a_token(
    model: nn.Module, method: MethodConfig, shapes: Mapping[str, tuple[int, int]], itemsize: int, checkpointing: bool
) -> int:
    """Bytes that a token of a padded forward and backward pass takes, through the modules of transformers.

    Per block some 16 values of the hidden size and 5 of the MLP's inner size, in the base's dtype; what the method's
    layers keep beside them, in float32 (their input where the base is narrower, and their output); logits four times
    in float32.
    """
    whole: Any = model
    config: Any = whole.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    block = (16 * hidden + 5 * inner) * itemsize
    if method.name in THROUGH_PEFT or method.name == "adapter":
        touched = [s for path, s in shapes.items() if method.name != "adapter" or _name(path) in OUTPUTS]
        widths = sum((inner_ if itemsize < 4 else 0) + (2 * out if method.name not in ("lora", "qlora") else out)
                     for out, inner_ in touched)  # fmt: skip
        block += 4 * widths // layers
    kept = block + layers * hidden * itemsize if checkpointing else layers * block
    return int(1.2 * (kept + 4 * 4 * config.vocab_size))
