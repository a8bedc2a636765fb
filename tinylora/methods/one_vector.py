"""A method's trainable numbers as one vector v of shape (1, n), which is all that loop, engine and controls know of.

v is the distance from where the method starts: its parameters are start + v, so v = 0 computes what the base computes,
the norm of v says how far training went, and every control made for TinyLoRA's v (random vectors of the same norm)
means the same here. Adam on the distance takes the steps that Adam on the parameters takes.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinylora.adapter.finite import all_finite
from tinylora.config.method import MethodConfig
from tinylora.errors import UserError
from tinylora.generation.native.runner import Around
from tinylora.methods.swap import Slot, slots_of, swapped


@dataclass(frozen=True, eq=False, slots=True)
class Beside:
    """What a method's layer computes besides its plain map."""

    factors: tuple[Tensor, Tensor] | None = None
    """A (r, in) and B (out, r) float32: B A x is added to what the plain map computes."""
    around: Around | None = None
    """What comes before and behind that."""


GetBeside = Callable[[nn.Module], Beside]
"""A method's layer with its present parameters -> what it computes besides its plain map."""


@dataclass(frozen=True, eq=False, slots=True)
class Wrapped:
    """A module of the base and what the method put in its place."""

    path: str
    plain: nn.Module
    layer: nn.Module


class MethodAdapter:
    """A method on a model: see the module. The model computes with v inside of `using` or `merged`, nowhere else."""

    def __init__(
        self,
        model: nn.Module,
        config: MethodConfig,
        names: list[str],
        wrapped: list[Wrapped],
        paths: list[str],
        *,
        beside: GetBeside | None = None,
    ) -> None:
        """names: the parameters to train, which are frozen here. Without wrapped modules they are the base's own.

        beside: what an engine that has the plain maps computes besides them, for a method with layers of its own.
        """
        self.model = model
        self.method = config
        self.wrapped = wrapped
        self.paths = paths
        self.excluded: dict[str, str] = {}
        self._beside = beside
        self.peft_model: Any = None
        """PEFT's wrapper around the model, where its layers are PEFT's."""
        self._slots: list[Slot] = slots_of(model, names)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if wrapped:  # small, and trained: kept in float32 whatever the base is in
            for slot in self._slots:
                slot.parameter.data = slot.parameter.data.float()
        self._sizes = [slot.parameter.numel() for slot in self._slots]
        self._value = self.zeros()
        self._merged: tuple[Tensor, list[Tensor]] | None = None

    def beside(self, v: Tensor) -> list[tuple[Wrapped, Beside]]:
        """What the layer of every wrapped module computes under v besides its plain map."""
        assert self._beside is not None
        with torch.no_grad(), swapped(self._slots, self._parameters(self._checked(v))):
            return [(one, self._beside(one.layer)) for one in self.wrapped]

    @property
    def num_trained(self) -> int:
        """Count of trained numbers."""
        return sum(self._sizes)

    @property
    def shape(self) -> tuple[int, int]:
        """Of v."""
        return 1, self.num_trained

    def zeros(self) -> Tensor:
        """A fresh v = 0 (1, n), float32, where the parameters are."""
        return torch.zeros(1, self.num_trained, device=self._slots[0].parameter.device)

    def read(self) -> Tensor:
        """A detached copy of what was written last."""
        return self._value.clone()

    def write(self, v: Tensor | None) -> None:
        """Keep v for `read`. Raises: UserError if the shape is wrong or a number is not finite."""
        self._value = self.zeros() if v is None else self._checked(v).detach().clone()

    def check_shape(self, v: Tensor) -> None:
        """Raises: UserError unless v has the method's shape, and every number is finite."""
        if tuple(v.shape) != self.shape:
            raise UserError(f"numbers of shape {tuple(v.shape)} do not fit {self.method.describe()}: {self.shape}")
        if not all_finite(v):
            raise UserError("the numbers hold one that is not finite; nothing was changed")

    def _checked(self, v: Tensor) -> Tensor:
        self.check_shape(v)
        return v.to(device=self._slots[0].parameter.device, dtype=torch.float32)

    def _parameters(self, v: Tensor) -> list[Tensor]:
        """start + v in the shapes and dtypes of the parameters, differentiable in v."""
        pieces = v.flatten().split(self._sizes)
        found = []
        for slot, piece in zip(self._slots, pieces, strict=True):
            start = slot.parameter.detach()
            found.append((start.float() + piece.view(start.shape)).to(start.dtype))
        return found

    def tensors(self, v: Tensor | None = None) -> dict[str, Tensor]:
        """The parameters themselves, start + v, by name."""
        with torch.no_grad():
            found = self._parameters(self._value if v is None else self._checked(v))
        return {slot.name: tensor for slot, tensor in zip(self._slots, found, strict=True)}

    @contextmanager
    def using(self, v: Tensor | None) -> Iterator[None]:
        """Run a block under v (1, n), differentiable in it; None runs the bare base, without the method's layers."""
        if v is None:
            with self._bare():
                yield
            return
        with swapped(self._slots, self._parameters(self._checked(v))):
            yield

    def for_inference(self) -> AbstractContextManager[object]:
        """Around forward passes under one v without gradient: what hangs on the parameters alone is computed once."""
        if self.method.name != "dora" or self.peft_model is None:
            return nullcontext()
        from peft.helpers import DoraCaching

        for module in self.model.modules():
            clear = getattr(module, "_cache_clear", None)
            if clear is not None:
                clear()  # what was computed under another v
        return DoraCaching()

    @contextmanager
    def merged(self, v: Tensor | None) -> Iterator[nn.Module]:
        """Full fine-tuning: the model with start + v in its weights, which are new tensors; the frozen ones stay.

        Raises: UserError for a method with layers of its own.
        """
        if self.wrapped:
            raise UserError(f"{self.method.describe()} is not merged into the weights")
        if v is None:
            self._merged = None
            yield self.model
            return
        v = self._checked(v).detach()
        if self._merged is None or not torch.equal(self._merged[0], v):
            self._merged = None  # frees the old ones before the new ones are made
            with torch.no_grad():
                self._merged = (v.clone(), self._parameters(v))
        with swapped(self._slots, self._merged[1]):
            yield self.model

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """The model without the method's layers."""
        with ExitStack() as stack:
            for one in self.wrapped:
                set_module(self.model, one.path, one.plain)
                stack.callback(set_module, self.model, one.path, one.layer)
            yield

    def detach(self) -> nn.Module:
        """Take the method off; the model is what it was, module for module."""
        for one in self.wrapped:
            set_module(self.model, one.path, one.plain)
        self.wrapped, self._merged = [], None
        return self.model

    def check(self) -> bytes:
        """Four bytes of the names, shapes and starting values: another library version may draw others.

        Full fine-tuning starts from the base itself, whose fingerprint is checked as it is.
        """
        digest = hashlib.sha256(f"{self.method.name} {self.method.rank} {self.method.alpha:g}\n".encode())
        for slot in self._slots:
            digest.update(f"{slot.name} {tuple(slot.parameter.shape)}\n".encode())
            if self.wrapped:
                digest.update(slot.parameter.detach().cpu().numpy().tobytes())
        return digest.digest()[:4]

    def agrees_with(self, check: bytes) -> bool:
        """Whether the method started here from the same values."""
        return check == self.check()


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
