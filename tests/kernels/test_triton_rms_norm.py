"""The Triton kernel of RMS norm against float64, interpreted on a CPU and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
import triton_testing
from torch import Tensor
from triton_testing import DEVICE, FLOAT_TYPES, assert_close, poison

triton_testing.need_triton()

from quire.kernels.rms_norm import add_rms_norm_triton, rms_norm_triton  # noqa: E402

EPS = 1e-5
SHAPES = [(1, 1), (3, 64), (2, 576), (5, 1000), (1, 2048), (0, 64)]


def normalized(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_norm_equals_its_definition(rows: int, size: int, dtype: torch.dtype) -> None:
    """Without it every layer's input on a GPU may be off."""
    x = torch.randn(rows, size, device=DEVICE, dtype=dtype) * 3
    weight = torch.randn(size, device=DEVICE)
    out = rms_norm_triton(x, weight, EPS, dtype)
    if rows:
        exact = normalized(x.double(), weight.double())
        assert_close(out, exact, normalized(x.float(), weight).to(dtype))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("residual_dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_residual_is_added_first_and_kept(
    rows: int, size: int, residual_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """Without it the residual stream on a GPU may lose a layer's output."""
    residual = torch.randn(rows, size, device=DEVICE, dtype=residual_dtype) * 5
    x = torch.randn(rows, size, device=DEVICE, dtype=dtype)
    weight = torch.randn(size, device=DEVICE)
    total = (residual.float() + x.float()).to(residual_dtype)
    kept = poison(rows, 3 * size, dtype=residual_dtype)
    out = add_rms_norm_triton(residual, x, weight, EPS, dtype, kept[:, size : 2 * size])
    assert torch.equal(residual, total) and torch.equal(kept[:, size : 2 * size], total)
    assert kept[:, :size].isnan().all() and kept[:, 2 * size :].isnan().all()
    if rows:
        exact = normalized(total.double(), weight.double())
        assert_close(out, exact, normalized(total.float(), weight).to(dtype))


def test_rows_may_be_slices_of_longer_ones() -> None:
    """Without it a norm of one part of a product's output reads its neighbours."""
    wide = torch.randn(4, 300, device=DEVICE)
    weight = torch.randn(100, device=DEVICE)
    x = wide[:, 100:200]
    exact = normalized(x.double(), weight.double())
    assert_close(rms_norm_triton(x, weight, EPS, torch.float32), exact, normalized(x, weight))


def test_a_layout_that_the_kernel_cannot_read_is_refused() -> None:
    """Without it a transposed input gives wrong numbers and no error."""
    x = torch.randn(8, 8, device=DEVICE).t()
    weight = torch.randn(8, device=DEVICE)
    with pytest.raises(ValueError, match="contiguous along its last dimension"):
        rms_norm_triton(x, weight, EPS, torch.float32)
    with pytest.raises(ValueError, match="residual must be contiguous"):
        add_rms_norm_triton(x, x, weight, EPS, torch.float32)
    with pytest.raises(ValueError, match=r"what is kept must be \[8, 8\]"):
        add_rms_norm_triton(x.t(), x.t(), weight, EPS, torch.float32, x[:4])
