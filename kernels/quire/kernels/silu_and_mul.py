"""The gated activation of Llama's feed-forward layer (SwiGLU: Shazeer, "GLU Variants Improve Transformer", 2020)."""
# ruff: noqa: N803

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quire.kernels._triton import ceil_div, gdc_launch_dependents, gdc_wait, jit, may_overlap, overlap_option, tl

_BLOCK = 1024


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) · up for x = [gate | up], [T, 2 I] of any float type; the result has x's type, [T, I]."""
    if x.is_cuda:
        return silu_and_mul_triton(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@jit
def _silu_and_mul_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """A block of one row a program, in float32."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    x = x_ptr + row * (2 * SIZE) + column
    gate = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + SIZE, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * SIZE + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_and_mul_triton(x: Tensor) -> Tensor:
    """`silu_and_mul`; x must be contiguous."""
    if not x.is_contiguous():
        raise ValueError(f"x must be contiguous, and its strides are {x.stride()}")
    rows, size = x.shape[0], x.shape[1] // 2
    out, overlaps = torch.empty((rows, size), dtype=x.dtype, device=x.device), may_overlap(x.device)
    _silu_and_mul_kernel[(rows, ceil_div(size, _BLOCK))](
        x, out, SIZE=size, BLOCK=_BLOCK, DEPENDENT=overlaps, num_warps=4, **overlap_option(overlaps)
    )
    return out
