"""Arithmetic on adapters of one basis: how far apart two are, and what lies between them.

v is linear in dW, so adapters on the same base and basis can be averaged and interpolated as vectors; on another basis
the numbers mean something else, and that is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tinylora.adapter.config import AdapterConfig
from tinylora.errors import UserError
from tinylora.store.adapter import Adapter


@dataclass(frozen=True, slots=True)
class Difference:
    """Two vectors on one basis."""

    norm_a: float
    norm_b: float
    distance: float
    """|a - b|."""
    cosine: float
    """NaN where one of them is zero."""
    largest: tuple[int, int, float, float]
    """Tie group, number in it, and both values, where they differ most."""


def refuse_other_basis(a: Adapter, b: Adapter) -> None:
    """Raises: UserError, naming it, for anything in which two adapters differ beside their numbers."""
    if a.explicit is not None or b.explicit is not None:
        bound = a if a.explicit is not None else b
        raise UserError(
            f"{bound.label} brings factors of its own; only adapters on a rebuilt basis can be compared or mixed"
        )
    if a.method != b.method:
        raise UserError(f"{a.label} holds {a.method.describe()} and {b.label} {b.method.describe()}")
    assert a.config is not None and b.config is not None
    one, two = _meant(a.config), _meant(b.config)
    if one != two:
        first = next(name for name in a.config.__slots__ if getattr(one, name) != getattr(two, name))
        raise UserError(
            f"{a.label} and {b.label} are on different bases of update: adapter.{first} is "
            f"{getattr(a.config, first)!r} and {getattr(b.config, first)!r}"
        )
    if bool(a.fingerprint) != bool(b.fingerprint):
        one_without = a if a.fingerprint is None else b
        raise UserError(f"{one_without.label} does not say which base it is for; encode it first: tinylora encode")
    if a.fingerprint and b.fingerprint and a.fingerprint != b.fingerprint:
        raise UserError(
            f"{a.label} and {b.label} are for different base models ({a.fingerprint.hex()}, {b.fingerprint.hex()})"
        )
    if a.run and b.run and not (a.fingerprint and b.fingerprint) and a.run.model.name != b.run.model.name:
        raise UserError(
            f"{a.label} and {b.label} are for different base models ({a.run.model.name}, {b.run.model.name})"
        )
    if a.check and b.check and a.check != b.check:
        raise UserError(f"the bases of {a.label} and {b.label} were rebuilt differently (their checks disagree)")
    if a.v.shape != b.v.shape:
        raise UserError(f"{a.label} has {tuple(a.v.shape)} numbers and {b.label} {tuple(b.v.shape)}")


def _meant(config: AdapterConfig) -> AdapterConfig:
    """The settings with what changes nothing put in one form, as the portable file has them."""
    ties = config.num_groups == 0 and config.tying in ("tiled", "structured")
    return replace(config, targets=tuple(sorted(config.targets)), n_tie=config.n_tie if ties else 1)


def difference(a: Adapter, b: Adapter) -> Difference:
    """Raises: UserError if the two are not on one basis."""
    refuse_other_basis(a, b)
    x, y = a.v.double(), b.v.double()
    norms = float(x.norm()), float(y.norm())
    at = int((x - y).abs().argmax())
    group, place = divmod(at, x.shape[1])
    cosine = float((x * y).sum()) / (norms[0] * norms[1]) if norms[0] and norms[1] else math.nan
    return Difference(
        *norms, float((x - y).norm()), cosine, (group, place, float(x[group, place]), float(y[group, place]))
    )


def mix(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """sum_i w_i v_i. Raises: UserError for other counts, weights that are not finite, or adapters not on one basis."""
    if len(adapters) < 2 or len(weights) != len(adapters):
        raise UserError(
            f"{len(adapters)} adapters and {len(weights)} weights were given; give one weight for each, at least two"
        )
    if not all(math.isfinite(w) for w in weights):
        raise UserError(f"the weights must be finite numbers, got {', '.join(map(str, weights))}")
    first = adapters[0]
    if first.method.name not in ("tinylora", "lora-xs"):
        raise UserError(
            f"{first.label} holds {first.method.describe()}, whose update is no linear function of its numbers; only "
            "TinyLoRA's adapters can be mixed"
        )
    for place, one in enumerate(adapters):
        for other in adapters[place + 1 :]:
            refuse_other_basis(one, other)
    v = sum(
        (w * one.v.double() for w, one in zip(weights, adapters, strict=True)), start=torch.zeros_like(first.v).double()
    )
    known = next((one for one in adapters if one.fingerprint and one.check), first)
    mixed = v.float()
    if not torch.isfinite(mixed).all():
        raise UserError("a mixed number is too large for float32; give smaller weights")
    label = " + ".join(f"{w:g} {one.label}" for w, one in zip(weights, adapters, strict=True))
    return replace(first, label=label, v=mixed, value_type="float32", fingerprint=known.fingerprint, check=known.check)
