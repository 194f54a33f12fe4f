"""The types in which keys and values lie in the pool: the model's, or FP8, which halves their memory and its reading.

FP8 is e4m3 (Micikevicius et al., "FP8 Formats for Deep Learning", 2022): 4 bits of exponent, 3 of mantissa, no
infinity. Its largest number is 448, to which larger ones are cut; NaN stays NaN. Numbers are stored as they are, by a
scale of 1: models' keys and values are of the size of 1 to 100. Attention computes in the queries' type.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
from torch import Tensor

from quire.kernels._triton import jit, tl

FP8 = torch.float8_e4m3fn

_FP8_MAX = 448.0


def query_type(pages: Tensor, qkv: Tensor) -> torch.dtype:
    """What queries and attention's output are: what the pool is, or what `qkv`, the product, is if that is FP8."""
    return qkv.dtype if pages.dtype is FP8 else pages.dtype


def as_stored(new: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values in the pool's type, and the pool, both of one type that torch can copy: FP8 as bytes."""
    if pages.dtype is not FP8:
        return new.to(pages.dtype), pages
    cut = new.to(torch.float32).clamp(-_FP8_MAX, _FP8_MAX)
    return cut.to(FP8).view(torch.uint8), pages.view(torch.uint8)


@jit
def to_pool(x: tl.tensor, POOL: tl.constexpr) -> tl.tensor:
    """x in the pool's type."""
    if POOL.is_fp8():
        wide = x.to(tl.float32)
        # Comparisons, as a minimum might lose a NaN.
        wide = tl.where(wide > 448.0, 448.0, tl.where(wide < -448.0, -448.0, wide))
        stored = wide.to(POOL)
    else:
        stored = x.to(POOL)
    return stored
