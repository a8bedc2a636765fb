"""The update's formula against float64 NumPy, and the module that adds it."""

import numpy as np
import pytest
import torch
from torch import nn

from tinylora.adapter.layer import AdaptedLinear, Vector, delta_weight, mixing_matrix


def factors(seed: int = 0, out: int = 6, inp: int = 5, r: int = 2, u: int = 3) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)  # given, not from an SVD: dW depends on the signs an SVD leaves open
    U, S, V = rng.normal(size=(out, r)), rng.uniform(1, 2, size=r), rng.normal(size=(inp, r))
    return U, S, V, rng.normal(size=(u, r, r)), rng.normal(size=u)


def test_delta_follows_the_published_rule() -> None:
    U, S, V, P, v = factors()
    got = delta_weight(*map(torch.from_numpy, (U, S, V, P, v))).numpy()
    np.testing.assert_allclose(got, np.einsum("ok,k,i,ikl,nl->on", U, S, v, P, V), rtol=1e-12)
    assert not np.allclose(got, np.einsum("ok,i,ikl,l,nl->on", U, v, P, S, V))  # S on the wrong side
    assert not np.allclose(got, np.einsum("ok,k,i,ilk,nl->on", U, S, v, P, V))  # R transposed
    root = np.sqrt(S)
    assert not np.allclose(got, np.einsum("ok,k,i,ikl,l,nl->on", U, root, v, P, root, V))  # PEFT's split of S


def test_mixing_matrix_per_row() -> None:
    *_, P, _ = factors()
    rows = np.random.default_rng(1).normal(size=(4, 3))
    got = mixing_matrix(torch.from_numpy(rows), torch.from_numpy(P)).numpy()
    np.testing.assert_allclose(got, np.einsum("bi,ijk->bjk", rows, P), rtol=1e-12)
    with pytest.raises(ValueError, match="v holds 2 numbers a group but P has 3 matrices"):
        mixing_matrix(torch.zeros(2), torch.from_numpy(P))


def adapted(base: nn.Module, value: torch.Tensor, dtype: torch.dtype, tie_group: int = 1) -> AdaptedLinear:
    U, S, V, P, _ = factors()
    A, B, mix = (torch.from_numpy(np.ascontiguousarray(t)).to(dtype) for t in (V.T, U * S, P))
    return AdaptedLinear(base, A, B, mix, tie_group, Vector(value))


def test_forward_is_x_times_the_updated_weight() -> None:
    U, S, V, P, v = factors()
    base = nn.Linear(5, 6, dtype=torch.float64)
    value = torch.stack([torch.full((3,), 9.0, dtype=torch.float64), torch.from_numpy(v)])  # group 1 is the module's
    layer = adapted(base, value, torch.float64)
    x = np.random.default_rng(2).normal(size=(2, 3, 4, 5))
    W = base.weight.detach().numpy() + np.einsum("ok,k,i,ikl,nl->on", U, S, v, P, V)
    got = layer(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(got, x @ W.T + base.bias.detach().numpy(), rtol=1e-10, atol=1e-12)


def test_one_vector_a_row_equals_a_loop_over_rows() -> None:
    base = nn.Linear(5, 6)
    rows = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(1))
    together = adapted(base, rows, torch.float32)(x)
    for i in range(4):
        alone = adapted(base, rows[i], torch.float32)(x[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], adapted(base, rows[1], torch.float32)(x[:1])[0], atol=1e-2)
    with pytest.raises(ValueError, match="4 adapter vectors for a batch of 3 rows"):
        adapted(base, rows, torch.float32)(x[:3])


def test_the_sum_is_rounded_once_to_the_dtype_of_the_base() -> None:
    base = nn.Linear(5, 6, dtype=torch.bfloat16)
    value = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = adapted(base, value, torch.float32)(x)
    U, S, V, P, _ = factors()
    dW = np.einsum("ok,k,i,ikl,nl->on", U, S, value[1].double().numpy(), P, V)
    exact = base(x).double().detach() + x.double() @ torch.from_numpy(dW).T
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).abs().max() <= exact.abs().max() * 2**-8 + 1e-4  # half a unit in the last place


def test_a_zero_vector_is_exact_and_still_has_a_gradient() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = nn.Linear(5, 6, dtype=dtype)
        value = torch.zeros(2, 3, requires_grad=True)
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
        got = adapted(base, value, torch.float32)(x)
        assert torch.equal(got, base(x))
        got.float().square().sum().backward()
        assert value.grad is not None
        assert value.grad[1].abs().min() > 0
        assert not value.grad[0].any()
