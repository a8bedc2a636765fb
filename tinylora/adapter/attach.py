"""Put an adapter on a model and take it off; read and write v; merge into copies of the pristine weights."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tinylora.adapter.basis import Factors, model_basis
from tinylora.adapter.check import agrees, basis_check
from tinylora.adapter.config import MAX_NUMBERS, AdapterConfig
from tinylora.adapter.explicit import ExplicitFactors
from tinylora.adapter.grouping import select_targets, tie_groups
from tinylora.adapter.layer import AdaptedLinear, Vector, delta_weight, mixing_matrix
from tinylora.adapter.projection import Float64Array, projection
from tinylora.adapter.quantised import dequantised, keep_differentiable, quantisation, weight_shape
from tinylora.errors import UserError
from tinylora.system.memory import device_memory
from tinylora.talk import format_bytes

PARAMETER = "tinylora_v"
P_BYTES = 8 + 4
"""Of a number of P: the adapter's own in float64, the layer's in float32."""

Shape = tuple[int, int]
"""(out, in) of a linear map."""


def linear_maps(model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear and Conv1D of a model by path, adapted ones by the path of the map they hold."""
    held = {id(module.base) for module in model.modules() if isinstance(module, AdaptedLinear)}
    maps: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            maps[path] = module.base
        elif isinstance(module, (nn.Linear, Conv1D)) and id(module) not in held:
            maps[path] = module
    return maps


def map_shapes(model: nn.Module, paths: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of linear maps by path, however they store their weight."""
    maps = linear_maps(model)
    return {path: weight_shape(maps[path]) for path in paths}


def output_head_path(model: nn.Module) -> str | None:
    """Path of the output head, which all-linear leaves out."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    return next((path for path, module in model.named_modules() if module is head), None)


@dataclass(eq=False)
class AttachedAdapter:
    """An adapter on a model: its config, its modules in canonical order, and the vector v (groups, u) in float32."""

    model: nn.Module
    config: AdapterConfig
    paths: list[str]
    groups: list[int]
    excluded: dict[str, str]
    factors: dict[str, Factors]
    projections: dict[str, Float64Array] = field(repr=False)
    """P of each module, (u, r, r)."""
    vector: Vector
    layers: dict[str, AdaptedLinear] = field(repr=False)
    is_explicit: bool = False
    """The factors were given, and cannot be rebuilt from the base and the config."""

    @property
    def num_groups(self) -> int:
        """Number of tie groups."""
        return max(self.groups) + 1

    @property
    def shape(self) -> tuple[int, int]:
        """Of v: (groups, u)."""
        return self.num_groups, self.config.u

    @property
    def num_trained(self) -> int:
        """Count of trained numbers: groups times u."""
        return self.num_groups * self.config.u

    def zeros(self) -> Tensor:
        """A fresh v = 0 of shape (groups, u), where the model's factors live."""
        if not self.layers:
            raise UserError("the adapter was taken off the model; attach it again first")
        layer = next(iter(self.layers.values()))
        return torch.zeros(self.shape, dtype=layer.A.dtype, device=layer.A.device)

    def read(self) -> Tensor:
        """A detached copy of v."""
        return self.vector.value.detach().clone()

    def check_shape(self, v: Tensor) -> None:
        """Raises: UserError unless v is (groups, u) or (rows, groups, u), and every number finite."""
        expected = self.shape
        if tuple(v.shape[-2:]) != expected or v.dim() not in (2, 3):
            raise UserError(
                f"an adapter vector of shape {tuple(v.shape)} does not fit; allowed: {expected}, or (rows, *{expected})"
            )
        if not torch.isfinite(v.detach()).all():
            raise UserError("the adapter vector holds a number that is not finite; nothing was changed")

    def write(self, v: Tensor | None) -> None:
        """Set v: (groups, u) for all rows, (rows, groups, u) for one per row, None for zero.

        Raises: UserError if the shape is wrong or a number is not finite.
        """
        if v is None:
            v = self.zeros()
        self.check_shape(v)
        reference = self.zeros()
        v = v.to(device=reference.device, dtype=reference.dtype)
        parameter = self.model._parameters.get(PARAMETER)
        if parameter is not None and v.dim() == 2 and self.vector.value is parameter:
            parameter.data.copy_(v)
        else:
            self.vector.value = v

    @contextmanager
    def using(self, v: Tensor | None) -> Iterator[None]:
        """Run a block with another v (None: the base model), then put the old one back."""
        before = self.vector.value
        self.vector.value = self.zeros()  # so that a parameter keeps its numbers
        try:
            self.write(v)
            yield
        finally:
            self.vector.value = before

    def delta(self, path: str, v: Tensor | None = None) -> Tensor:
        """dW of one module, (out, in), computed in float64."""
        f = self.factors[path]
        return delta_weight(f.U, f.S, f.V, torch.from_numpy(self.projections[path]), self._vector_of(path, v))

    def delta_factors(self, path: str, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """dW of one module as two thin factors, U diag(S) R (out, r) and V^T (r, in), in float64 on the CPU."""
        f = self.factors[path]
        R = mixing_matrix(self._vector_of(path, v), torch.from_numpy(self.projections[path]))
        return (f.U * f.S) @ R, f.V.T

    def _vector_of(self, path: str, v: Tensor | None) -> Tensor:
        value = self.vector.value if v is None else v
        if value.dim() != 2:
            raise UserError(f"{len(value)} vectors, one per row, have no one update; write one v")
        return value[self.groups[self.paths.index(path)]].detach().cpu().double()

    def refuse_quantised(self, reason: str) -> None:
        """Raises: UserError, with the reason, if the base is quantised."""
        if kind := self.quantisation:
            raise UserError(
                f"the base is quantised ({kind}) and {reason}; keep the adapter beside it, or export it with --to lora "
                "for the same quantised base"
            )

    def check(self) -> bytes:
        """Four bytes that another machine compares with its own basis (check.py)."""
        return basis_check(self.paths, self.factors, self.projections, self.groups)

    def agrees_with(self, check: bytes) -> bool:
        """Whether this is the basis that the four bytes were made of."""
        return agrees(check, self.paths, self.factors, self.projections, self.groups)

    def as_parameter(self) -> nn.Parameter:
        """v as a parameter `tinylora_v` of the model, for training loops that collect a model's parameters.

        It is the only one that requires a gradient. `write` changes its numbers; `detach` takes it off the model.
        """
        if not isinstance(self.vector.value, nn.Parameter):
            parameter = nn.Parameter(self.read())
            self.model.register_parameter(PARAMETER, parameter)
            self.vector.value = parameter
        return self.vector.value

    @contextmanager
    def lifted(self) -> Iterator[nn.Module]:
        """Run a block on the bare base model, then put the adapter back."""
        parameter = self.model._parameters.pop(PARAMETER, None)
        for path, layer in self.layers.items():
            _set_module(self.model, path, layer.base)
        try:
            yield self.model
        finally:
            for path, layer in self.layers.items():
                _set_module(self.model, path, layer)
            if parameter is not None:
                self.model.register_parameter(PARAMETER, parameter)

    def detach(self) -> nn.Module:
        """Take the adapter off; the model is what it was before, module for module. Its weights stay frozen."""
        for path, layer in self.layers.items():
            _set_module(self.model, path, layer.base)
        self.layers = {}
        self.model._parameters.pop(PARAMETER, None)
        return self.model

    def is_transposed(self, path: str) -> bool:
        """Whether the module stores its weight as (in, out)."""
        return isinstance(self.layers[path].base, Conv1D)

    def base_weight(self, path: str) -> Tensor:
        """The frozen weight of one module, as it is stored; dequantised where it is quantised."""
        base = self.layers[path].base
        return dequantised(base) if quantisation(base) else _weight(base).detach()

    @property
    def quantisation(self) -> str:
        """How the adapted maps are quantised; "" if they are not."""
        return next((kind for layer in self.layers.values() if (kind := quantisation(layer.base))), "")

    def merged_weights(self) -> dict[str, Tensor]:
        """Weights with the update merged, by module path: pristine weight plus dW in float64, then cast once.

        The model itself is not touched: merging in place and taking it back out drifts.
        Raises: UserError if v is one per row, or the base is quantised.
        """
        self.refuse_quantised("its weights are never quantised anew, so nothing can be merged into them")
        merged = {}
        for path, layer in self.layers.items():
            weight = _weight(layer.base)
            place = torch.device("cpu") if weight.device.type == "mps" else weight.device  # mps has no float64
            dW = self.delta(path).to(place)
            if isinstance(layer.base, Conv1D):
                dW = dW.T
            merged[path] = (weight.detach().to(place).double() + dW).to(weight.dtype).to(weight.device)
        return merged


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def adapted_paths(model: nn.Module, config: AdapterConfig) -> tuple[dict[str, nn.Module], list[str]]:
    """Linear maps of the model and, in canonical order, those that the config's targets name.

    Raises: UserError if a target matches nothing or holds packed weights, or rank exceeds its smallest dimension.
    """
    maps = linear_maps(model)
    paths = select_targets(list(maps), config.targets, output_head_path(model))
    for path in paths:
        _refuse_unreadable(path, maps[path])
        shape = weight_shape(maps[path]) if quantisation(maps[path]) else tuple(_weight(maps[path]).shape)
        if config.rank > min(shape):
            raise UserError(
                f"adapter.rank {config.rank} exceeds the smallest dimension of {path} {shape}; at most {min(shape)}"
            )
    return maps, paths


def _refuse_unreadable(path: str, module: nn.Module) -> None:
    """A packed weight of a format that nobody here can read."""
    weight = _weight(module)
    if not weight.dtype.is_floating_point and not quantisation(module):
        raise UserError(f"{path} holds packed weights of type {weight.dtype}; load the model dequantised")


def attach(
    model: nn.Module,
    config: AdapterConfig,
    *,
    cache_dir: Path | None = None,
    source: Path | Sequence[Path] | None = None,
    projections: Callable[[int, str, int, int], Float64Array] = projection,
) -> AttachedAdapter:
    """Freeze the model and put an adapter with v = 0 on it.

    The basis is taken from the cache in `cache_dir`, or computed and stored there. `source` names the weight files on
    disk (or their folder), so that an unchanged file is not hashed again. A module whose basis is not unique (gap below
    1e-6 sigma_1) is left out by rule; `excluded` says which and why. `projections` (seed, path, u, rank) gives P where
    it is not TinyLoRA's.

    On weights that bitsandbytes or torchao has quantised the basis is that of their dequantised values, and the update
    stays beside the quantised map.

    Raises: UserError for targets that match nothing, a rank too large, a packed weight of another kind, or a model that
    already has an adapter.
    """
    _refuse_second(model)
    if projections is projection:
        config.check_projection()
    keep_differentiable(model)
    maps, paths = adapted_paths(model, config)
    factors, excluded = model_basis({path: maps[path] for path in paths}, config, cache_dir, source)
    kept = [path for path in paths if path not in excluded]
    if not kept:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(excluded.items())[:3])
        raise UserError(f"every target module was left out ({reasons}); choose other targets")
    groups = tie_groups(kept, config)
    _refuse_too_much(config, len(kept), max(groups) + 1)
    P = {path: projections(config.seed, path, config.u, config.rank) for path in kept}
    return _put_on(model, maps, config, kept, groups, factors, P, excluded)


def _refuse_too_much(config: AdapterConfig, modules: int, groups: int) -> None:
    """Raises: UserError for more trained numbers than a file holds, or more of P than this machine's memory does."""
    if groups * config.u > MAX_NUMBERS:
        raise UserError(
            f"{groups:,} tie groups of u = {config.u:,} are {groups * config.u:,} trained numbers, and at most "
            f"{MAX_NUMBERS:,} are allowed; take a smaller u, or more modules a group"
        )
    needed, there = P_BYTES * modules * config.u * config.rank**2, device_memory(torch.device("cpu")).total
    if needed > there:
        raise UserError(
            f"P of {modules} modules with u = {config.u:,} and rank {config.rank} takes {format_bytes(needed)}, and "
            f"this machine has {format_bytes(there)}; take a smaller u or rank"
        )


def attach_explicit(model: nn.Module, explicit: ExplicitFactors) -> AttachedAdapter:
    """Freeze the model and put an adapter with given factors and v = 0 on it.

    Raises: UserError for a module that the model lacks or that has another shape, a packed weight, or a model that
    already has an adapter.
    """
    _refuse_second(model)
    keep_differentiable(model)
    maps, factors, projections = linear_maps(model), {}, {}
    for path, module in explicit.modules.items():
        if path not in maps:
            raise UserError(f"the adapter is for {path}, which this model does not have; give the base it was made for")
        _refuse_unreadable(path, maps[path])
        shape = weight_shape(maps[path])
        if shape != module.shape:
            raise UserError(
                f"the adapter's {path} has shape {module.shape} and this model's {shape}; give its own base"
            )
        factors[path] = Factors(module.U, module.S, module.V, gap=1.0)
        projections[path] = module.P.numpy()
    paths = list(explicit.modules)
    config = AdapterConfig(rank=explicit.rank, u=explicit.u, tying="none", targets=tuple(paths))
    groups = [module.tie_group for module in explicit.modules.values()]
    return _put_on(model, maps, config, paths, groups, factors, projections, {}, is_explicit=True)


def _refuse_second(model: nn.Module) -> None:
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise UserError("the model already has an adapter; call detach() on it first")


def _put_on(
    model: nn.Module,
    maps: dict[str, nn.Module],
    config: AdapterConfig,
    paths: list[str],
    groups: list[int],
    factors: dict[str, Factors],
    projections: dict[str, Float64Array],
    excluded: dict[str, str],
    *,
    is_explicit: bool = False,
) -> AttachedAdapter:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    vector = Vector(torch.zeros(0))
    layers: dict[str, AdaptedLinear] = {}
    for path, group in zip(paths, groups, strict=True):
        base = maps[path]
        weight = _weight(base)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        f = factors[path]
        A, B, P = (
            t.to(dtype).contiguous().to(weight.device)  # in this order, as mps has no float64
            for t in (f.V.T, f.U * f.S, torch.from_numpy(projections[path]))
        )
        layers[path] = AdaptedLinear(base, A, B, P, tie_group=group, vector=vector)
        _set_module(model, path, layers[path])
    adapter = AttachedAdapter(model, config, paths, groups, excluded, factors, projections, vector, layers, is_explicit)
    adapter.write(None)
    return adapter


def linear_shapes(model: nn.Module) -> Counter[Shape]:
    """How often each (out, in) occurs among the model's linear maps, the output head included."""
    shapes: Counter[Shape] = Counter()
    for module in linear_maps(model).values():
        shapes[weight_shape(module)] += 1
    return shapes
