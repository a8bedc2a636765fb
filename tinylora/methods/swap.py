"""Put other tensors in the place of a model's parameters for a block: they are never written to, so nothing drifts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, eq=False, slots=True)
class Slot:
    """One parameter and every place where the model holds it (tied weights stand in several)."""

    name: str
    parameter: nn.Parameter
    places: tuple[tuple[nn.Module, str], ...]


def slots_of(model: nn.Module, names: Sequence[str]) -> list[Slot]:
    """Slots of the named parameters, in the order of `names`."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    known = dict(model.named_parameters())
    return [Slot(name, known[name], tuple(places[id(known[name])])) for name in names]


@contextmanager
def swapped(slots: Sequence[Slot], tensors: Sequence[Tensor]) -> Iterator[None]:
    """The model with `tensors` instead of the slots' parameters. May be nested; gradients flow into the tensors."""
    before = [[module._parameters[name] for module, name in slot.places] for slot in slots]
    try:
        for slot, tensor in zip(slots, tensors, strict=True):
            for module, name in slot.places:
                module._parameters[name] = tensor  # type: ignore[assignment]
        yield
    finally:
        for slot, held in zip(slots, before, strict=True):
            for (module, name), parameter in zip(slot.places, held, strict=True):
                module._parameters[name] = parameter
