"""U, S, V of one module: from the SVD of its canonical weight, random, or sketched. Signs are canonical."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylora.adapter.projection import standard_block, uniform_block
from tinylora.adapter.svd import top_triplets
from tinylora.errors import UserError

ALGORITHM = 1
"""Part of every cache key; raised when the same weights and config would give other factors than before."""
MIN_SIGN_MARGIN = 1e-4
"""A linear form closer to zero than this does not decide a sign."""


@dataclass(frozen=True, eq=False)
class Factors:
    """One module's basis in float64: U (out, r) and V (in, r) with orthonormal columns, S (r,) falling."""

    U: Tensor
    S: Tensor
    V: Tensor
    gap: float
    """svd: smallest step among sigma_1, ..., sigma_{r+1}, over sigma_1. sketch: smallest share of a sketched column
    that is independent of the columns before it. random: 1. In each case 0 says that the basis is not defined."""
    residual: float = 0.0
    """svd: max_i of |W v_i - s_i u_i| and |W^T u_i - s_i v_i|, over sigma_1; 0 for the others."""
    sign_margin: float = math.inf
    """svd: the smallest margin by which a sign was decided; infinite for the others."""


def svd_factors(weight: Tensor, rank: int) -> Factors:
    """The top `rank` singular triplets of a canonical weight (out, in), with the canonical signs of docs/format.md.

    Converged in float64: residual at most 1e-9 sigma_1, and at most 1e-8 of the gap (see `svd.top_triplets`).
    Raises: UserError if rank exceeds the smaller side.
    """
    _check_rank(tuple(weight.shape), rank)
    found = top_triplets(weight.float(), rank)
    signs, margin = _signs(found.U, found.V)
    return Factors(found.U * signs, found.S, found.V * signs, found.gap, found.residual, margin)


def random_factors(shape: tuple[int, int], rank: int, seed: int, path: str, norm: float = 1.0) -> Factors:
    """Orthonormal U (out, r) and V (in, r) from the portable generator, keyed by seed and module path; S = `norm`.

    `model_basis` gives `root_mean_square_sigma` as the norm. Raises: UserError if rank exceeds the smaller side.
    """
    _check_rank(shape, rank)
    U, _ = _orthonormal(_portable(f"tinylora/random/out/1\n{seed}\n{path}", shape[0], rank))
    V, _ = _orthonormal(_portable(f"tinylora/random/in/1\n{seed}\n{path}", shape[1], rank))
    return Factors(U, torch.full((rank,), norm, dtype=torch.float64), V, gap=1.0 if norm > 0 else 0.0)


def sketch_factors(weight: Tensor, rank: int, seed: int, path: str) -> Factors:
    """U = orth(W Omega), V = orth(W^T Psi) with portable random Omega (in, r), Psi (out, r); one pass over W, no SVD.

    Every S is `root_mean_square_sigma`. Gram-Schmidt keeps each column's own direction, so there is no sign to choose.
    Raises: UserError if rank exceeds the smaller side.
    """
    out, columns = weight.shape
    _check_rank((out, columns), rank)
    omega = _portable(f"tinylora/sketch/in/1\n{seed}\n{path}", columns, rank)
    psi = _portable(f"tinylora/sketch/out/1\n{seed}\n{path}", out, rank)
    exact = weight.double()
    U, gap_out = _orthonormal(exact @ omega)
    V, gap_in = _orthonormal(exact.T @ psi)
    S = torch.full((rank,), root_mean_square_sigma(weight), dtype=torch.float64)
    return Factors(U, S, V, gap=min(gap_out, gap_in))


def root_mean_square_sigma(weight: Tensor) -> float:
    """||W||_F / sqrt(min(out, in)): the root mean square of the singular values, which takes no SVD."""
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64)) / math.sqrt(min(weight.shape))


def _signs(U: Tensor, V: Tensor) -> tuple[Tensor, float]:
    """Sign (r,) for each pair (u_i, v_i), and the smallest margin: that of v_i where it is enough, else that of u_i."""
    by_v, by_u = _reference(len(V)) @ V, _reference(len(U)) @ U
    form = torch.where(by_v.abs() >= MIN_SIGN_MARGIN, by_v, by_u)
    return torch.where(form < 0, -1.0, 1.0).double(), float(form.abs().min())


@functools.lru_cache(maxsize=32)
def _reference(length: int) -> Tensor:
    return torch.from_numpy(uniform_block("tinylora/sign/1", length) - 0.5)


def _portable(key: str, rows: int, rank: int) -> Tensor:
    return torch.from_numpy(standard_block(key, rows * rank).reshape(rows, rank))


def _orthonormal(columns: Tensor) -> tuple[Tensor, float]:
    """Gram-Schmidt, each column twice, no sign changed; and the smallest share of a column that was left of it."""
    done: list[Tensor] = []
    smallest = 1.0
    for column in columns.T:
        length = float(column.norm())
        rest = column
        for _ in range(2):
            for other in done:
                rest = rest - other * (other @ rest)
        left = float(rest.norm())
        smallest = min(smallest, left / length if length > 0 else 0.0)
        done.append(rest / left if left > 0 else rest)
    return torch.stack(done, dim=1), smallest


def _check_rank(shape: tuple[int, ...], rank: int) -> None:
    if not 1 <= rank <= min(shape):
        raise UserError(f"adapter.rank must be 1 to {min(shape)} for a weight of shape {tuple(shape)}, got {rank}")
