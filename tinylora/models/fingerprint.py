"""What base model this is: twelve bytes over its canonical weights, however it was loaded.

The first four bytes depend on the architecture and the shapes alone, so that a stranger's base can be told to be of
the same kind; the other eight on every weight, rounded to bfloat16. docs/format.md specifies them.
Leaves out: numbers of the config (rope, norm epsilon), which change what a model computes but not what an adapter adds.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinylora.adapter.layer import AdaptedLinear
from tinylora.adapter.projection import uniform_integers
from tinylora.adapter.quantised import dequantised, quantisation, weight_shape
from tinylora.system.cores import available_threads
from tinylora.system.digest import file_state, save_memo
from tinylora.system.paths import cache_dir

SHAPE_BYTES, WEIGHT_BYTES = 4, 8
SLICE_ELEMENTS = 2**24
BUCKETS = 32
"""Signed sums kept of each tensor, from which the distance of two bases is estimated."""
_SIGN_ROWS = 2048

BaseWeight = Tensor | nn.Module
"""A weight, or the map that holds a quantised one."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The identity of a base model."""

    shape: bytes
    weights: bytes

    def __bytes__(self) -> bytes:
        return self.shape + self.weights

    def hex(self) -> str:
        """24 hex digits."""
        return bytes(self).hex()

    @classmethod
    def of(cls, data: bytes) -> "Fingerprint":
        """From its twelve bytes."""
        assert len(data) == SHAPE_BYTES + WEIGHT_BYTES
        return cls(data[:SHAPE_BYTES], data[SHAPE_BYTES:])


@dataclass(frozen=True, eq=False, slots=True)
class Identity:
    """A base model's fingerprint, and what tells how far another base is from it."""

    fingerprint: Fingerprint
    architecture: str
    num_weights: int
    sketches: Mapping[str, tuple[float, ...]]
    """Signed sums of the canonical values of each tensor, by name."""
    squares: float
    """Sum of the squares of all canonical values."""

    def distance(self, other: "Identity") -> float | None:
        """|W - W'| / |W| over all canonical weights, estimated to some per cent of itself; None for other tensors."""
        if self.sketches.keys() != other.sketches.keys() or not self.squares:
            return None
        pairs = [(self.sketches[name], other.sketches[name]) for name in self.sketches]
        total = sum((a - b) ** 2 for one, two in pairs for a, b in zip(one, two, strict=True))
        return float((total / self.squares) ** 0.5)


def identify(model: nn.Module, files: Sequence[Path] = ()) -> Identity:
    """The identity of a model, with or without an adapter on it.

    files: the weight files it was loaded from and that it still agrees with; while their path and state (system/
    digest.py) stay the same, nothing is hashed again. Leave them out for weights that were changed in memory.
    """
    memo = _memo(files, model) if files else None
    if memo is not None and (known := _read(memo)) is not None:
        return known
    found = _identify(model)
    if memo is not None:
        save_memo(memo, json.dumps(to_json(found)))
    return found


def _identify(model: nn.Module) -> Identity:
    tensors = base_tensors(model)
    with ThreadPoolExecutor(available_threads()) as pool:  # hashing lets go of Python's lock
        summaries = dict(zip(tensors, pool.map(_summarise, tensors.values()), strict=True))
    name = type(model).__name__
    shapes = "".join(f"{path} {_shape(tensor)}\n" for path, tensor in tensors.items())
    weights = "".join(f"{path} {_shape(tensor)} {summaries[path][0]}\n" for path, tensor in tensors.items())
    fingerprint = Fingerprint(
        hashlib.sha256(f"tinylora/shapes/1\n{name}\n{shapes}".encode()).digest()[:SHAPE_BYTES],
        hashlib.sha256(f"tinylora/weights/1\n{name}\n{weights}".encode()).digest()[:WEIGHT_BYTES],
    )
    return Identity(
        fingerprint=fingerprint,
        architecture=name,
        num_weights=sum(_count(tensor) for tensor in tensors.values()),
        sketches={path: summary[1] for path, summary in summaries.items()},
        squares=sum(summary[2] for summary in summaries.values()),
    )


def base_tensors(model: nn.Module) -> dict[str, BaseWeight]:
    """Every weight of the base model, by its path in the bare model, in the order of their code points.

    Of weights that are shared, the first name stands for all. What an adapter adds is left out. In the place of a
    quantised weight stands the map that holds it: all of them dequantised at once would be the model they replace.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, BaseWeight] = {}
    quantised = {id(module.weight): module for module in model.modules() if quantisation(module)}
    held = {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, name = path.rpartition(".")
        outer, _, last = owner.rpartition(".")
        if owner in held:
            continue  # a parameter of the adapter itself
        if last == "base" and outer in held:
            owner = outer
        if not owner:
            continue  # models keep their weights in modules; a trained v may be registered at the top
        names.setdefault(id(parameter), []).append(f"{owner}.{name}")
        tensors[id(parameter)] = quantised.get(id(parameter), parameter.detach())
    return dict(sorted((min(paths), tensors[key]) for key, paths in names.items()))


def _count(weight: BaseWeight) -> int:
    return math.prod(weight_shape(weight)) if isinstance(weight, nn.Module) else weight.numel()


def _shape(weight: BaseWeight) -> str:
    """A quantised weight has the shape of what it stands for: the base it was made from is of the same kind."""
    if isinstance(weight, nn.Module):
        return "x".join(map(str, weight_shape(weight)))
    tensor = weight
    packed = "" if tensor.dtype.is_floating_point else f" {str(tensor.dtype).removeprefix('torch.')}"
    return "x".join(map(str, tensor.shape)) + packed


def _slices(tensor: Tensor) -> Iterator[Tensor]:
    """The canonical values, flat and a part at a time: bfloat16, or what a packed weight holds."""
    flat = tensor.reshape(-1)
    for start in range(0, max(1, flat.numel()), SLICE_ELEMENTS):
        part = flat[start : start + SLICE_ELEMENTS]
        if part.dtype.is_floating_point:
            part = (part.float() if part.dtype == torch.float64 else part).to(torch.bfloat16)
        yield part.cpu().contiguous()


def _summarise(weight: BaseWeight) -> tuple[str, tuple[float, ...], float]:
    """SHA-256 of a weight's canonical values in little-endian bytes, its signed sums, and its sum of squares."""
    tensor = dequantised(weight) if isinstance(weight, nn.Module) else weight
    digest, sums, squares = hashlib.sha256(), torch.zeros(BUCKETS, dtype=torch.float64), 0.0
    signs = _signs()
    for part in _slices(tensor):
        digest.update(part.view(torch.uint8).numpy().data)
        values = torch.nn.functional.pad(part.float(), (0, -part.numel() % signs.numel()))
        squares += float(values.double().square().sum()) if part.numel() < 2**16 else float(values.square().sum())
        sums += (values.view(-1, *signs.shape) * signs).sum(dim=(0, 1)).double()
    return digest.hexdigest(), tuple(sums.tolist()), squares


@functools.cache
def _signs() -> Tensor:
    bits: NDArray[np.uint64] = uniform_integers("tinylora/signs/1", _SIGN_ROWS * BUCKETS) & np.uint64(1)
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1).reshape(_SIGN_ROWS, BUCKETS)


# --- the memory of files that have been seen ---


def _memo(files: Sequence[Path], model: nn.Module) -> Path:
    """Keyed by the files and by what the model took of them: another config.json takes other tensors, and quantising
    makes others of them, which may hang on the dtype that the model was loaded in."""
    stats = [[str(path.resolve()), *file_state(path)] for path in sorted(files)]
    taken = [[path, _shape(weight), *_made(weight, model)] for path, weight in base_tensors(model).items()]
    key = json.dumps([type(model).__name__, taken, *stats])
    return cache_dir() / "digests" / f"base-{hashlib.sha256(key.encode()).hexdigest()}.json"


def _made(weight: BaseWeight, model: nn.Module) -> list[str]:
    return [quantisation(weight), str(getattr(model, "dtype", ""))] if isinstance(weight, nn.Module) else []


def _read(memo: Path) -> Identity | None:
    try:
        return from_json(json.loads(memo.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no memo, or a damaged one: it is only a saving


def to_json(identity: Identity) -> dict[str, object]:
    """Plain data, for the caches."""
    return {
        "fingerprint": identity.fingerprint.hex(),
        "architecture": identity.architecture,
        "num_weights": identity.num_weights,
        "squares": identity.squares,
        "sketches": {name: [float(f"{x:.7g}") for x in sums] for name, sums in identity.sketches.items()},
    }


def from_json(data: Mapping[str, object]) -> Identity:
    """What `to_json` gave. Raises: KeyError, TypeError or ValueError for anything else."""
    fingerprint = bytes.fromhex(str(data["fingerprint"]))
    if len(fingerprint) != SHAPE_BYTES + WEIGHT_BYTES:
        raise ValueError("a fingerprint has twelve bytes")
    sketches = data["sketches"]
    if not isinstance(sketches, dict):
        raise ValueError("sketches are kept by name")
    return Identity(
        fingerprint=Fingerprint.of(fingerprint),
        architecture=str(data["architecture"]),
        num_weights=int(str(data["num_weights"])),
        sketches={str(name): tuple(map(float, sums)) for name, sums in sketches.items()},
        squares=float(str(data["squares"])),
    )
