"""Root-mean-square normalization, alone and fused with the residual addition in front of it.

Algorithm: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
from torch import Tensor

from quire.kernels._triton import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    may_overlap,
    next_power_of_2,
    overlap_option,
    tl,
)

_ZERO = torch.zeros(())


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension.

    x float32 [T, H]; weight float32 [H]. Computed in float32; returned as `dtype` [T, H]. On a GPU x and weight may be
    of any float type.
    """
    if x.is_cuda:
        return rms_norm_triton(x, weight, eps, dtype)
    if x.ndim == 2 and x.shape[0] == 1:
        # Python's numbers are quicker than five operations on a tensor of one, and one fused product than two.
        row = x.view(-1)
        factor = (torch.dot(row, row).item() / x.shape[-1] + eps) ** -0.5
        return torch.addcmul(_ZERO, x, weight, value=factor).type(dtype)
    # The norm is one pass over x, where square().mean() is two and a copy.
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = length.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x * scale, weight, out=torch.empty_like(x, dtype=dtype))


def add_rms_norm(
    residual: Tensor, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, kept: Tensor | None = None
) -> Tensor:
    """residual += x, then `rms_norm` of it.

    residual float32 [T, H], changed in place; x of any float type [T, H]. On a GPU all may be of any float type: the
    sum is rounded to the residual's before it is normalized. `kept` [T, H] of the residual's type, whose rows may be
    strided, is filled with the sum.
    """
    if residual.is_cuda:
        return add_rms_norm_triton(residual, x, weight, eps, dtype, kept)
    residual.add_(x)
    if kept is not None:
        kept.copy_(residual)
    return rms_norm(residual, weight, eps, dtype)


@jit
def _rms_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    x_stride: tl.tensor,
    kept_stride: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    KEEP: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """One row a program. Residual and out are contiguous; x's rows are `x_stride` apart."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if DEPENDENT:
        # The product that follows asks for its weights meanwhile.
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        residual = residual_ptr + row * SIZE + column
        total = (tl.load(residual, mask=inside, other=0.0).to(tl.float32) + x).to(residual_ptr.dtype.element_ty)
        tl.store(residual, total, mask=inside)
        if KEEP:
            tl.store(kept_ptr + row * kept_stride + column, total, mask=inside)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    tl.store(out_ptr + row * SIZE + column, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`rms_norm`; x's rows may be strided."""
    return _launch(x, None, weight, eps, dtype, None)


def add_rms_norm_triton(
    residual: Tensor, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, kept: Tensor | None = None
) -> Tensor:
    """`add_rms_norm`; residual must be contiguous, x's rows may be strided."""
    if not residual.is_contiguous():
        raise ValueError(f"residual must be contiguous, and its strides are {residual.stride()}")
    check_kept(kept, residual)
    return _launch(x, residual, weight, eps, dtype, kept)


def check_kept(kept: Tensor | None, residual: Tensor) -> None:
    """Raises ValueError where a kernel that fills `kept` with the residual would write somewhere else."""
    if kept is not None and (kept.shape != residual.shape or kept.stride(1) != 1):
        raise ValueError(
            f"what is kept must be {list(residual.shape)}, its rows contiguous: it is {list(kept.shape)}, of strides "
            f"{kept.stride()}"
        )


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, kept: Tensor | None
) -> Tensor:
    rows, size = x.shape
    if x.stride(1) != 1:
        raise ValueError(f"x must be contiguous along its last dimension, and its strides are {x.stride()}")
    out = torch.empty((rows, size), dtype=dtype, device=x.device)
    block, overlaps = next_power_of_2(size), may_overlap(x.device)
    _rms_norm_kernel[(rows,)](
        x,
        out if residual is None else residual,
        weight,
        out,
        out if kept is None else kept,
        x.stride(0),
        0 if kept is None else kept.stride(0),
        eps,
        SIZE=size,
        BLOCK=block,
        ADD=residual is not None,
        KEEP=kept is not None,
        DEPENDENT=overlaps,
        # 16 elements a thread: few enough warps that their sum is quick, enough loads in flight to fill the memory.
        num_warps=min(16, max(1, block // 512)),
        **overlap_option(overlaps),
    )
    return out
