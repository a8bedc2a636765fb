"""Which numbers are trained: a frozen description. Leaves out how (tinylora.methods.build)."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from tinylora.errors import UserError

MethodName = Literal["tinylora", "lora-xs", "lora", "qlora", "dora", "vera", "ia3", "adapter", "full"]
THROUGH_PEFT = ("lora", "qlora", "dora", "vera", "ia3")
ON_QUANTISED = ("tinylora", "lora-xs", "lora", "qlora", "adapter")
"""Methods that leave the base's weights alone and never read them in floating point, but for their basis."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """What is trained. Which modules: adapter.targets; seed of what is drawn at random: adapter.seed."""

    name: MethodName = "tinylora"
    """tinylora (see [adapter]), lora-xs, lora, dora, vera, ia3 (PEFT's), qlora (lora on a quantised base), adapter
    (bottleneck layers), or full."""
    rank: int = 8
    """Rank of lora-xs, lora, qlora, dora and vera; width of adapter's bottleneck."""
    alpha: float = 32.0
    """lora, qlora, dora: the update is scaled by alpha / rank."""

    def __post_init__(self) -> None:
        if self.name not in get_args(MethodName):
            raise UserError(f"method.name must be one of {', '.join(get_args(MethodName))}, got {self.name!r}")
        if self.rank < 1:
            raise UserError(f"method.rank must be at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"method.alpha must be above 0, and finite, got {self.alpha}")

    def describe(self) -> str:
        """In words: lora of rank 8, full fine-tuning."""
        return {
            "full": "full fine-tuning",
            "adapter": f"adapter layers of width {self.rank}",
            "ia3": "ia3",
        }.get(self.name, f"{self.name} of rank {self.rank}")
