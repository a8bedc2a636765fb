"""What engines, learner and evaluation need of whatever is trained: an array of numbers that can be put on for a block.

`AttachedAdapter` (attach.py) is TinyLoRA's own; `tinylora.methods` has those of all other methods. v = None is the
bare base model, and v = 0 is the untrained method, which computes the same.
"""

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor


class Trained(Protocol):
    """A method on a model, and its numbers v of `shape`, float32."""

    paths: list[str]
    excluded: dict[str, str]
    """Modules that were left out, and why."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of v: (tie groups, u); (1, numbers) for methods that share nothing."""

    @property
    def num_trained(self) -> int:
        """Count of trained numbers."""

    def zeros(self) -> Tensor:
        """A fresh v = 0, where the model is."""

    def read(self) -> Tensor:
        """A detached copy of v."""

    def check_shape(self, v: Tensor) -> None:
        """Raises: UserError for a wrong shape or a number that is not finite. Nothing is changed."""

    def write(self, v: Tensor | None) -> None:
        """Set v; None is zero. Raises: UserError for a wrong shape or a number that is not finite."""

    def using(self, v: Tensor | None) -> AbstractContextManager[None]:
        """Run a block with another v (None: the base model), then put the old one back. Differentiable in v."""

    def check(self) -> bytes:
        """Four bytes that say whether another machine has rebuilt the same thing."""

    def agrees_with(self, check: bytes) -> bool:
        """Whether this is what the four bytes were made of."""
