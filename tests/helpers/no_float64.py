"""A stand-in for Apple's mps, whose tensors have no float64: torch refuses it there with a TypeError."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class NoFloat64(Tensor):
    """A tensor whose device has no float64, and what is computed with it; `cpu()` gives a usual one."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.cpu:
            return args[0].as_subclass(Tensor).clone()
        found = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(found, NoFloat64) and found.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return found
