"""The types in which keys and values lie in the pool: the model's, or FP8, which halves their memory and its reading.

FP8 is e4m3 (Micikevicius et al., "FP8 Formats for Deep Learning", 2022): 4 bits of exponent, 3 of mantissa, no
infinity. Its largest number is 448, to which larger ones are cut; NaN stays NaN. Numbers are stored as they are, by a
scale of 1: models' keys and values are of the size of 1 to 100.

Attention computes in the queries' type. But over FP8, instead of in bfloat16, in float16 where it can: that holds FP8
numbers exactly, too, and of them GPUs make it two at a time in one instruction. It has more digits for the keys'
weights, though none for those of less than 2^-25 of the largest so far.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
from torch import Tensor

from quire.kernels._triton import interpreted, jit, tl

FP8 = torch.float8_e4m3fn

_FP8_MAX = 448.0
# Triton's interpreter has no assembly.
_INTERPRETED = None if tl is None else tl.constexpr(interpreted())


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


@jit
def from_pool(x: tl.tensor, like: tl.tensor) -> tl.tensor:
    """x, which is of the pool's type, in that of `like`."""
    if x.dtype.is_fp8() and like.dtype == tl.bfloat16:
        # FP8 becomes float16 first, of which GPUs are slow to make bfloat16.
        x = x.to(tl.float32)
    return x.to(like.dtype)


@jit
def as_half(q: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """q in float16, each row times the power of two that makes its largest number about 2^14, and the rows' scales.

    What is lost is less than 2^-38 of that number.
    """
    wide = q.to(tl.float32)
    power = tl.floor(tl.log2(tl.maximum(tl.max(tl.abs(wide), 1), 1e-30))) - 14.0
    return (wide * tl.exp2(-power)[:, None]).to(tl.float16), scale * tl.exp2(power)


@jit
def unpack_pairs(pairs: tl.tensor) -> tl.tensor:
    """The first and the second FP8 number of each int16, in float16.

    A tile of int16 is transposed on its way from shared memory to the tensor cores: bytes would be read one by one.
    """
    if _INTERPRETED:
        first = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        second = ((pairs >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        # Of two pairs at a time. To sort their bytes takes one instruction here, and eight of the compiler's.
        first, second = tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted;
            .reg .b16 firsts, seconds;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {firsts, seconds}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, firsts;
            cvt.rn.f16x2.e4m3x2 $1, seconds;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return first, second
