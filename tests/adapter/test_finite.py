"""A NaN or an infinity anywhere is found."""

import pytest
import torch

from tinylora.adapter.finite import all_finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 500, 999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_bad_number_is_enough(bad: float, place: int, dtype: torch.dtype) -> None:
    x = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(x)
    x[0, place] = bad
    assert not all_finite(x)
    assert not all_finite(x.clone().requires_grad_())


def test_the_largest_finite_numbers_and_none_are_finite() -> None:
    assert all_finite(torch.tensor([3.4e38, -3.4e38]))
    assert all_finite(torch.zeros(0, 3))
