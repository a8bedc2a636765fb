"""The top singular triplets of one weight, converged in float64.

Cheap randomised SVDs are wrong here: sigma3/sigma2 of real weights is 0.96 in the median and 0.999 at worst, so they
return another subspace. Two phases, both on the Gram operator of the smaller side (n), reading W in slices that stay in
cache:

1. block Krylov with full reorthogonalisation in float32 (W is bf16, so exact there), until its Ritz pairs are worth
   more than float32 can still improve cheaply;
2. generalised Davidson in float64 (Morgan and Scott 1986): true residuals of the few wanted vectors, corrected through
   the Ritz pairs of phase 1, until the residual is below a target that shrinks with the gap, so that the vectors and
   not only the values are right.

Small matrices, ranks close to full, and whatever does not converge go to LAPACK in float64.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylora.adapter.projection import uniform_block

RESIDUAL = 1e-9
"""Largest residual, in units of sigma_1."""
VECTOR_ERROR = 1e-8
"""Largest residual over gap: bounds the error of the vectors themselves."""
ROUNDING_FLOOR = 2e-14
"""A residual, in units of sigma_1, that float64 can reach; asking for less would never end."""
LAPACK_SIDE = 192
"""Up to this smaller side a full float64 SVD costs about as much as iterating."""
BLOCK = 16
"""Phase 1 works on multiples of this many vectors: the least width at which a BLAS runs at full speed."""
MAX_BLOCKS = 30
KRYLOV_RESIDUAL = 1e-4
"""Where phase 1 stops: relative residual of the Gram operator; from there a step of phase 2 gains more a second."""
MAX_CORRECTIONS = 60
CLOSE_GAP = 1e-4
"""Below this gap sigma_{r+1} is converged too; above it, it is known to a quarter of the gap, so none is overlooked."""
SLICE_ELEMENTS_32, SLICE_ELEMENTS_64 = 2**20, 2**18
"""Weight entries in one slice, as measured best: 4 MB in float32, 2 MB in float64."""


@dataclass(frozen=True)
class Triplets:
    """U (out, r), S (r,), V (in, r) in float64, S falling, signs not fixed; sigma_{r+1} is 0 at full rank."""

    U: Tensor
    S: Tensor
    V: Tensor
    next_sigma: float
    residual: float
    """max_i of |W v_i - s_i u_i| and |W^T u_i - s_i v_i|, over sigma_1."""

    @property
    def gap(self) -> float:
        """Smallest step between neighbours among sigma_1, ..., sigma_{r+1}, over sigma_1; 0 for a zero matrix."""
        return _gap(torch.cat([self.S, self.S.new_tensor([self.next_sigma])]))


def top_triplets(W: Tensor, rank: int) -> Triplets:
    """The `rank` largest singular triplets of a finite float32 W (out, in).

    The residual is at most max(2e-14, min(1e-9, 1e-8 gap)) in units of sigma_1, where `gap` is that of the result; with
    a vanishing gap the vectors are not unique and only the residual of 1e-9 means something. The thread count moves the
    result by no more than that.
    """
    smallest, greatest = torch.aminmax(W)
    largest = max(-float(smallest), float(greatest))
    if min(W.shape) <= LAPACK_SIDE or 8 * (rank + 1) > min(W.shape) or largest == 0.0:
        return _lapack(W, rank)
    out, columns = W.shape
    tall = W if out >= columns else W.T
    exponent = math.frexp(largest)[1]
    # A power of two is exact; it keeps the squares of phase 1 inside float32's range.
    scale = math.ldexp(1.0, exponent) if abs(exponent) > 20 else 1.0
    found = _davidson(tall if scale == 1.0 else tall / scale, rank)
    if found is None:
        return _lapack(W, rank)
    left, right = (found.U, found.V) if out >= columns else (found.V, found.U)
    return Triplets(left, found.S * scale, right, found.next_sigma * scale, found.residual)


def target_residual(gap: float) -> float:
    """The residual to reach for a gap; both over sigma_1."""
    return max(ROUNDING_FLOOR, min(RESIDUAL, VECTOR_ERROR * gap))


def _gap(sigma: Tensor) -> float:
    return float((sigma[:-1] - sigma[1:]).min() / sigma[0]) if float(sigma[0]) > 0 else 0.0


def _lapack(W: Tensor, rank: int) -> Triplets:
    exact = W.double()
    U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
    next_sigma = float(S[rank]) if rank < len(S) else 0.0
    U, S, V = U[:, :rank].contiguous(), S[:rank].clone(), Vh[:rank].T.contiguous()
    return Triplets(U, S, V, next_sigma, _residual(exact @ V, exact.T @ U, U, S, V))


def _residual(WV: Tensor, WtU: Tensor, U: Tensor, S: Tensor, V: Tensor) -> float:
    if float(S[0]) == 0.0:
        return 0.0
    return float(torch.maximum((WV - U * S).norm(dim=0), (WtU - V * S).norm(dim=0)).max() / S[0])


def _krylov(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Phase 1 for a tall M (m, n): Ritz values (k,) of M^T M, falling, in float64, and vectors (n, k) in float32."""
    n = M.shape[1]
    width = BLOCK * -(-(rank + BLOCK // 2) // BLOCK)
    block = _start(n, width)
    Q, images = torch.empty(n, 0), torch.empty(n, 0)
    last = max(1, min(MAX_BLOCKS, n // (2 * width)))
    for count in range(1, last + 1):
        image = _gram_times(M, block)
        Q, images = torch.cat([Q, block], dim=1), torch.cat([images, image], dim=1)
        if count % 2 == 0 or count == last:
            H = Q.T @ images
            theta, C = torch.linalg.eigh((H + H.T).double() / 2)
            theta, C = theta.flip(0), C.flip(1).float()
            top = C[:, :rank]
            residual = (images @ top - Q @ (top * theta[:rank].float())).norm(dim=0).max()
            if count == last or float(residual) <= KRYLOV_RESIDUAL * float(theta[0]):
                break
        block = torch.linalg.qr(image - Q @ (Q.T @ image)).Q
        block = torch.linalg.qr(block - Q @ (Q.T @ block)).Q  # once more: the first pass loses orthogonality
    return theta, Q @ C


@functools.lru_cache(maxsize=8)
def _start(n: int, width: int) -> Tensor:
    uniforms = torch.from_numpy(uniform_block("tinylora/krylov/1", n * width) - 0.5)
    return torch.linalg.qr(uniforms.reshape(n, width).float()).Q


def _davidson(M: Tensor, rank: int) -> Triplets | None:
    """Phase 2 for a tall M (m, n); None if it does not converge."""
    theta, ritz = _krylov(M, rank)
    X = torch.linalg.qr(ritz[:, : rank + 1].double()).Q
    Y, Z = _products(M, X)
    for _ in range(MAX_CORRECTIONS):
        values, C = (part.flip(-1) for part in torch.linalg.eigh(Y.T @ Y))
        sigma = values.clamp_min(0).sqrt()
        if not float(sigma[rank - 1]) > 0:
            return None
        gap = _gap(sigma[: rank + 1])
        wanted = rank + 1
        errors = Z @ C[:, :wanted] - X @ C[:, :wanted] * values[:wanted]
        # |W^T u - s v| is the error of the Gram operator over s. Of sigma_{r+1} only the value matters, for the gap.
        limits = target_residual(gap) * sigma[:wanted] * sigma[0]
        limits[rank] = (RESIDUAL if gap < CLOSE_GAP else gap / 4) * sigma[rank - 1] * sigma[0]
        unfinished = errors.norm(dim=0) > limits
        if not bool(unfinished.any()):
            return _finish(X, Y, Z, rank)
        new = _corrections(errors[:, unfinished], values[:wanted][unfinished], theta, ritz)
        for _ in range(2):
            new = torch.linalg.qr(new - X @ (X.T @ new)).Q
        new_Y, new_Z = _products(M, new)
        X, Y, Z = torch.cat([X, new], dim=1), torch.cat([Y, new_Y], dim=1), torch.cat([Z, new_Z], dim=1)
    return None


def _corrections(errors: Tensor, values: Tensor, theta: Tensor, ritz: Tensor) -> Tensor:
    """(value - M^T M)^-1 times the residuals (n, k), with M^T M known by phase 1's pairs and taken as 0 elsewhere."""
    scale = errors.norm(dim=0)
    unit = (errors / scale).float()
    inside = ritz.T @ unit
    distance = values - theta[:, None]
    weight = torch.where(distance.abs() < 1e-6 * theta[0], 0.0, values / distance).float()
    corrected: Tensor = ritz @ (inside * (weight - 1)) + unit
    return corrected.double()


def _finish(X: Tensor, Y: Tensor, Z: Tensor, rank: int) -> Triplets | None:
    """Rayleigh-Ritz on M itself, not on its square: u from the SVD of Y = M X, v turned along with them."""
    U, S, Ch = torch.linalg.svd(Y, full_matrices=False)
    C, top = Ch[:rank].T, S[:rank].clone()
    U, V = U[:, :rank].contiguous(), X @ C
    found = Triplets(U, top, V, float(S[rank]), _residual(Y @ C, (Z @ C) / top, U, top, V))
    # Squares lose digits where sigma_r is far below sigma_1: what is not within its limit is left to LAPACK.
    return found if found.residual <= 2 * target_residual(found.gap) else None


def _gram_times(M: Tensor, X: Tensor) -> Tensor:
    """M^T (M X) in float32, slice by slice, so that M is read once."""
    total = torch.zeros(M.shape[1], X.shape[1])
    for part in _slices(M, SLICE_ELEMENTS_32):
        total.addmm_(part.T, part @ X)
    return total


def _products(M: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """M X and M^T (M X) in float64 for few columns; one column at a time, because narrow products are slower still.

    M lies in memory by rows, and one pass makes both; or by columns (it is the transpose of a wide weight), and then
    two passes along these are faster than one across them.
    """
    columns = [x.contiguous() for x in X.unbind(1)]
    if M.stride(0) >= M.stride(1):
        pieces = [_both(part.double(), columns) for part in _slices(M, SLICE_ELEMENTS_64)]
        images = sum((image for _, image in pieces[1:]), start=pieces[0][1])
        return torch.cat([product for product, _ in pieces]), images
    products = torch.zeros(len(columns), M.shape[0], dtype=torch.float64)
    done = 0
    for part in _slices(M.T, SLICE_ELEMENTS_64):
        exact = part.double().T
        for product, x in zip(products, columns, strict=True):
            product.addmv_(exact, x[done : done + len(part)])
        done += len(part)
    exact_parts = (part.double() for part in _slices(M.T, SLICE_ELEMENTS_64))
    images = torch.cat([torch.stack([exact @ y for y in products], dim=1) for exact in exact_parts])
    return products.T, images


def _both(part: Tensor, columns: list[Tensor]) -> tuple[Tensor, Tensor]:
    products = [part @ x for x in columns]
    return torch.stack(products, dim=1), torch.stack([part.T @ y for y in products], dim=1)


def _slices(M: Tensor, elements: int) -> tuple[Tensor, ...]:
    slices: tuple[Tensor, ...] = torch.split(M, max(1, elements // M.shape[1]))
    return slices
