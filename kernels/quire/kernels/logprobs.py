"""Log-probabilities on a GPU: of the chosen token, its rank, and the most likely ones, for the rows that ask for them.

The same report as `quire.engine.logprobs`, its reference, makes on a CPU, of logits as the model gave them. The most
likely tokens are found one by one: the greatest of the blocks' maxima says which block holds the next, and only that
block is read (a tournament, Knuth, "The Art of Computer Programming" 3, 5.2.3). Equal logits go by token.
"""
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels._triton import jit, tl
from quire.kernels.vocab_blocks import BLOCK, LOG2_E, vocab_blocks

_TILE = 4096


@dataclass(frozen=True, slots=True)
class Logprobs:
    """What was found of N rows; rows that did not ask for it hold whatever was there."""

    chosen: Tensor  # float32 [N], of the chosen token
    ranks: Tensor  # int32 [N], how many are more likely, plus 1
    top_tokens: Tensor  # int32 [N, M], the most likely first
    top_logprobs: Tensor  # float32 [N, M]


def new_logprobs(num_rows: int, most: int, device: torch.device) -> Logprobs:
    """Room for N rows and `most` tokens each."""
    return Logprobs(
        torch.empty(num_rows, dtype=torch.float32, device=device),
        torch.empty(num_rows, dtype=torch.int32, device=device),
        torch.empty((num_rows, most), dtype=torch.int32, device=device),
        torch.empty((num_rows, most), dtype=torch.float32, device=device),
    )


def report_triton(logits: Tensor, slots: Tensor, tokens: Tensor, num_top: Tensor, out: Logprobs) -> None:
    """Fills `out` for the rows whose slot is not negative and whose `num_top[slot]` is not.

    logits [N, V] of any float type, before adjustments and masks; slots int [N]; tokens int [N], the chosen ones, of
    which -1 counts as 0; num_top int by slot: how many of the most likely to report, at most M.
    """
    blocks = vocab_blocks(logits, slots, None, num_top)
    num_rows, num_blocks = blocks.maxima.shape
    _report_kernel[(num_rows,)](
        logits,
        blocks.maxima,
        blocks.sums,
        slots,
        tokens,
        num_top,
        out.chosen,
        out.ranks,
        out.top_tokens,
        out.top_logprobs,
        logits.stride(0),
        logits.shape[1],
        num_blocks,
        MOST=out.top_tokens.shape[1],
        BLOCK=BLOCK,
        PADDED=blocks.padded,
        TILE=_TILE,
        LOG2_E=LOG2_E,
        num_warps=8,
    )


@jit
def _report_kernel(
    logits_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    num_top_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    top_tokens_ptr: tl.tensor,
    top_logprobs_ptr: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    num_blocks: tl.tensor,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    LOG2_E: tl.constexpr,
) -> None:
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    wanted = tl.load(num_top_ptr + tl.maximum(slot, 0)).to(tl.int32)
    if (slot < 0) | (wanted < 0):
        return
    row_ptr = logits_ptr + row * logits_stride
    block = tl.arange(0, PADDED)
    maxima = tl.load(maxima_ptr + row * num_blocks + block, mask=block < num_blocks, other=float("-inf"))
    sums = tl.load(sums_ptr + row * num_blocks + block, mask=block < num_blocks, other=0.0)
    best = tl.max(maxima, 0)
    total = tl.sum(tl.where(maxima > float("-inf"), sums * tl.exp2((maxima - best) * LOG2_E), 0.0), 0)
    # A logit minus this is its log-probability.
    normalizer = best + tl.log2(total) / LOG2_E

    token = tl.maximum(tl.load(tokens_ptr + row), 0).to(tl.int32)
    logit = tl.load(row_ptr + token).to(tl.float32)
    greater = tl.zeros((TILE,), tl.int32)
    for start in range(0, vocab_size, TILE):
        other = start + tl.arange(0, TILE)
        x = tl.load(row_ptr + other, mask=other < vocab_size, other=float("-inf")).to(tl.float32)
        greater += (x > logit).to(tl.int32)
    tl.store(chosen_ptr + row, logit - normalizer)
    tl.store(ranks_ptr + row, tl.sum(greater, 0) + 1)

    last_value = float("inf") + best
    last_token = token * 0 - 1
    for place in range(tl.minimum(tl.minimum(wanted, MOST), vocab_size)):
        value = tl.max(maxima, 0)
        index = tl.min(tl.where(maxima == value, block, PADDED - 1), 0)
        member = index * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + member, mask=member < vocab_size, other=float("-inf")).to(tl.float32)
        # Greater ones were reported, and equal ones up to the last that was.
        floor = tl.where(value == last_value, last_token, -1)
        found = tl.min(tl.where((x == value) & (member > floor), member, vocab_size - 1), 0)
        tl.store(top_tokens_ptr + row * MOST + place, found)
        tl.store(top_logprobs_ptr + row * MOST + place, value - normalizer)
        rest = (x < value) | ((x == value) & (member > found))
        maxima = tl.where(block == index, tl.max(tl.where(rest, x, float("-inf")), 0), maxima)
        last_value = value
        last_token = found
