"""The update itself, and the thin module that holds a frozen linear map and adds it.

Leaves out: where U, S, V and P come from (basis.py, projection.py) and who shares v (grouping.py, attach.py).
"""

import torch
from torch import Tensor, nn


def mixing_matrix(v: Tensor, P: Tensor) -> Tensor:
    """R = sum_i v_i P_i, in the dtype of P (float32 or wider).

    Shapes: v (u,) -> (r, r), or one v per row (rows, u) -> (rows, r, r); P (u, r, r).
    Source: Morris et al. 2026, arXiv:2602.04118, section 4. Departures: none.
    Raises: ValueError if P and v disagree on u.
    """
    if v.shape[-1] != P.shape[0]:
        raise ValueError(f"v holds {v.shape[-1]} numbers a group but P has {P.shape[0]} matrices")
    return torch.einsum("...i,ijk->...jk", v.to(P.dtype), P)


def delta_weight(U: Tensor, S: Tensor, V: Tensor, P: Tensor, v: Tensor) -> Tensor:
    """Update of one module's weight: dW = U diag(S) (sum_i v_i P_i) V^T.

    Shapes: U (out, r), S (r,), V (in, r), P (u, r, r), v (u,) -> (out, in), in the dtype of P.
    Source: Morris et al. 2026, arXiv:2602.04118, section 4. Departures: none.
    Left open by the source: how P is drawn; ours is in `projection.py`.
    Raises: ValueError if P and v disagree on u.
    """
    return (U * S) @ mixing_matrix(v, P) @ V.T


class Vector:
    """Where a layer finds v: one holder for the whole model, so that a new v is one assignment.

    `value` is (groups, u) for the whole batch, or (rows, groups, u) with one vector per row of the batch.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value


class AdaptedLinear(nn.Module):
    """A frozen nn.Linear or Conv1D plus ((x A^T) R^T) B^T.

    A = V^T (r, in), B = U diag(S) (out, r), R = sum_i v_i P_i (r, r). Factors, v and the whole branch are in float32
    (float64 if the base is float64) whatever the base's dtype; the sum is rounded once to the base's dtype, so v = 0
    gives the base's output bit for bit while the gradient still flows.
    """

    A: Tensor
    B: Tensor
    P: Tensor

    def __init__(self, base: nn.Module, A: Tensor, B: Tensor, P: Tensor, tie_group: int, vector: Vector) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)
        self.register_buffer("P", P, persistent=False)
        self.tie_group = tie_group
        self.vector = vector

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, ..., in) -> (rows, ..., out), in the dtype of the base's output."""
        y: Tensor = self.base(x)
        R = mixing_matrix(self.vector.value[..., self.tie_group, :], self.P)
        h = nn.functional.linear(x.to(self.A.dtype), self.A)
        if R.dim() == 2:
            h = nn.functional.linear(h, R)
        else:
            if R.shape[0] != h.shape[0]:
                raise ValueError(f"{R.shape[0]} adapter vectors for a batch of {h.shape[0]} rows")
            h = torch.einsum("b...k,bjk->b...j", h, R)
        return (y + nn.functional.linear(h, self.B)).to(y.dtype)
