"""Four bytes that tell whether two machines rebuilt the same basis: a hash of U, S, V, P and the tie groups.

Factors agree between machines to some 1e-8 only, and a hash forgives nothing. So what is hashed are linear forms of
them, in steps of 1/32, and the encoder chooses which of sixteen offsets of the steps leaves all forms farthest from a
rounding edge; the offset travels with the hash. docs/format.md specifies it.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tinylora.adapter.factors import Factors
from tinylora.adapter.projection import Float64Array, uniform_block
from tinylora.errors import UserError

STEPS = 32
"""Steps of the forms in a unit; a form is some 0.3 in size."""
OFFSETS = 16
SAFE = 1e-7
"""In units of the forms: how near an edge may be. Factors are known to 2e-8."""


def basis_check(
    paths: Sequence[str], factors: Mapping[str, Factors], P: Mapping[str, Float64Array], groups: Sequence[int]
) -> bytes:
    """The check of a basis: first four bits the offset, then 28 of the hash.

    paths: adapted modules in canonical order, groups: the tie group of each; P by path, (u, r, r) in float64.
    Raises: UserError if every offset leaves a form within SAFE of an edge (odds of about 1e-40 at 200 modules of
    rank 2; likely from some 100,000 forms on).
    """
    forms = _forms(paths, factors)
    margins = [_margin(forms, offset) for offset in range(OFFSETS)]
    offset = int(np.argmax(margins))
    if margins[offset] < SAFE:
        raise UserError(
            f"{len(paths)} modules at this rank are too many for the check of a portable file, so the adapter has no "
            "short form; ship it with its factors: tinylora encode RUN --with-factors -o FILE.safetensors"
        )
    return _hash(paths, forms, P, groups, offset)


def agrees(
    check: bytes,
    paths: Sequence[str],
    factors: Mapping[str, Factors],
    P: Mapping[str, Float64Array],
    groups: Sequence[int],
) -> bool:
    """Whether a basis rebuilt here is the one that `check` was made of."""
    return _hash(paths, _forms(paths, factors), P, groups, check[0] >> 4) == check


def _forms(paths: Sequence[str], factors: Mapping[str, Factors]) -> Float64Array:
    """(modules, 3, r): w . v_i, w . u_i and log2 s_i."""
    length = max((max(len(factors[p].U), len(factors[p].V)) for p in paths), default=0)
    w = uniform_block("tinylora/check/1", length) - 0.5
    found = []
    for path in paths:
        U, S, V = (t.double().cpu().numpy() for t in (factors[path].U, factors[path].S, factors[path].V))
        found.append([w[: len(V)] @ V, w[: len(U)] @ U, np.log2(S)])
    return np.array(found)


def _scaled(forms: Float64Array, offset: int) -> Float64Array:
    scaled: Float64Array = forms * STEPS + offset / OFFSETS
    return scaled


def _margin(forms: Float64Array, offset: int) -> float:
    scaled = _scaled(forms, offset)
    return float(np.abs(scaled - np.round(scaled)).min(initial=0.5)) / STEPS


def _hash(
    paths: Sequence[str], forms: Float64Array, P: Mapping[str, Float64Array], groups: Sequence[int], offset: int
) -> bytes:
    steps: NDArray[np.int64] = np.floor(_scaled(forms, offset)).astype(np.int64)
    digest = hashlib.sha256(b"tinylora/check/1\n")
    for path, group, row in zip(paths, groups, steps.reshape(len(paths), -1), strict=True):
        digest.update(f"{path}\n{group}\n{' '.join(map(str, row.tolist()))}\n".encode())
        digest.update(np.ascontiguousarray(P[path], dtype="<f8").tobytes())
    first = digest.digest()[:4]
    return bytes([offset << 4 | first[0] & 0xF]) + first[1:]
