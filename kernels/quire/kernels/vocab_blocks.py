"""Logits in blocks of 256: each block's maximum and sum of exponentials, from which a row's draws and scores follow.

First pass of `quire.kernels.sample` and `quire.kernels.logprobs`, and the only one that reads all of the logits: what
comes after looks at the few blocks whose maxima say that they matter. A row is spread over many programs, so that one
request alone fills a GPU too.

A NaN counts as +inf, so a row's maximum says whether its logits can be used: it is finite, or they cannot.
"""
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels._triton import ceil_div, jit, next_power_of_2, tl

BLOCK = 256
_BLOCKS_PER_PROGRAM = 8
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class VocabBlocks:
    """The blocks of N rows of logits."""

    maxima: Tensor  # float32 [N, blocks]
    sums: Tensor  # float32 [N, blocks], of exp((logit - the block's maximum) / temperature); not set in greedy rows

    @property
    def padded(self) -> int:
        """The blocks of a row, rounded up to what Triton wants."""
        return next_power_of_2(self.maxima.shape[1])


def check_logits(logits: Tensor) -> None:
    """Raises ValueError where a kernel would read other numbers than were meant."""
    if logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(
            f"logits must be [N, V] and contiguous along V: shape {list(logits.shape)}, strides {logits.stride()}"
        )


def vocab_blocks(logits: Tensor, slots: Tensor, temperature: Tensor | None, chosen: Tensor | None) -> VocabBlocks:
    """Of rows whose slot is not negative and, if `chosen` is given, holds no negative entry there.

    logits [N, V] of any float type; slots int [N]; temperature float32 by slot, 0 is greedy, None is 1 for all;
    chosen int by slot.
    """
    check_logits(logits)
    num_rows, vocab_size = logits.shape
    num_blocks = ceil_div(vocab_size, BLOCK)
    sizes = (num_rows, num_blocks)
    blocks = VocabBlocks(*(torch.empty(sizes, dtype=torch.float32, device=logits.device) for _ in range(2)))
    _blocks_kernel[(num_rows, ceil_div(num_blocks, _BLOCKS_PER_PROGRAM))](
        logits,
        slots,
        slots if temperature is None else temperature,
        slots if chosen is None else chosen,
        blocks.maxima,
        blocks.sums,
        logits.stride(0),
        vocab_size,
        num_blocks,
        HAS_TEMPERATURE=temperature is not None,
        HAS_CHOSEN=chosen is not None,
        BLOCKS=_BLOCKS_PER_PROGRAM,
        BLOCK=BLOCK,
        LOG2_E=LOG2_E,
        num_warps=4,
    )
    return blocks


@jit
def _blocks_kernel(
    logits_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    num_blocks: tl.tensor,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_CHOSEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG2_E: tl.constexpr,
) -> None:
    """Some blocks of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    if HAS_CHOSEN:  # noqa: SIM102 - the one is known when the kernel is compiled
        if tl.load(chosen_ptr + slot) < 0:
            return
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(logits_ptr + row * logits_stride + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))
    best = tl.max(x, 1)
    place = row * num_blocks + block
    tl.store(maxima_ptr + place, best, mask=block < num_blocks)
    temperature = 1.0
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + slot)
    if temperature > 0.0:
        # Infinite maxima have no sum of use, and inf - inf is NaN.
        origin = tl.where(tl.abs(best) < float("inf"), best, 0.0)
        total = tl.sum(tl.exp2((x - origin[:, None]) * (LOG2_E / temperature)), 1)
        tl.store(sums_ptr + place, total, mask=block < num_blocks)


@jit
def first_equal(
    logits_ptr: tl.tensor,
    maxima: tl.tensor,
    best: tl.tensor,
    vocab_size: tl.tensor,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
) -> tl.tensor:
    """The lowest token whose logit is `best`, the greatest of `maxima`, which are a row's [PADDED]."""
    block = tl.arange(0, PADDED)
    first = tl.min(tl.where(maxima == best, block, PADDED), 0)
    token = first * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.min(tl.where(x == best, token, 2147483647), 0)
