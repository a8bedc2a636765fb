"""Adapter layers (Houlsby et al. 2019, arXiv:1902.00751): a bottleneck behind each block's attention and its MLP.

y + W_up f(W_down y + b_down) + b_up on the output y of each, f the exact GELU. W_up and both b start at zero instead of
near it, so that the untrained model is the base bit for bit, and the layer norms, which the paper trains too, stay
frozen: both departures from it. PEFT has no such layers.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

OUTPUTS = ("o_proj", "down_proj", "c_proj", "out_proj", "dense", "dense_4h_to_h", "fc2", "wo")
"""Names of the maps that end attention or MLP, in the architectures of transformers."""


class BottleneckAdapter(nn.Module):
    """`base` and a bottleneck on its output, in float32."""

    def __init__(self, base: nn.Module, hidden_size: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        weight: Tensor = base.weight  # type: ignore[assignment]
        down = torch.empty(width, hidden_size)
        bound = 1 / math.sqrt(hidden_size)  # as nn.Linear starts
        down.uniform_(-bound, bound, generator=generator)
        self.down_weight = nn.Parameter(down.to(weight.device))
        self.down_bias = nn.Parameter(torch.zeros(width, device=weight.device))
        self.up_weight = nn.Parameter(torch.zeros(hidden_size, width, device=weight.device))
        self.up_bias = nn.Parameter(torch.zeros(hidden_size, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., hidden), in the dtype of the base's output."""
        return self.behind()(self.base(x))

    def behind(self) -> Callable[[Tensor], Tensor]:
        """What is computed on the base's output, with the parameters as they are now."""
        down, down_bias, up, up_bias = self.down_weight, self.down_bias, self.up_weight, self.up_bias

        def bottleneck(y: Tensor) -> Tensor:
            z = y.to(down.dtype)
            h = nn.functional.gelu(nn.functional.linear(z, down, down_bias))
            return (z + nn.functional.linear(h, up, up_bias)).to(y.dtype)

        return bottleneck
