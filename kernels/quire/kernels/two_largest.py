"""The two most likely tokens of each row of logits: what a head drafts, and what it would have drafted instead.

Logits are read once, by many programs a row, each of which leaves the two largest of its part; a second launch finds
the two largest of those. Of equal ones the first in the vocabulary is the larger; a NaN counts as +inf.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
from torch import Tensor

from quire.kernels._triton import ceil_div, jit, next_power_of_2, tl
from quire.kernels.vocab_blocks import check_logits

_BLOCK = 2048


def two_largest(logits: Tensor, token_ids: Tensor | None = None) -> Tensor:
    """int64 [2, N], the larger ones first, of logits [N, V] of any float type, V ≥ 2; where int `token_ids` [V] is
    given, its entries there."""
    check_logits(logits)
    if logits.is_cuda:
        return two_largest_triton(logits, token_ids)
    rows = torch.where(logits.isnan(), torch.inf, logits)
    first = rows.argmax(-1)
    second = rows.scatter(1, first[:, None], -torch.inf).argmax(-1)
    # A row may hold nothing but -inf elsewhere.
    second = torch.where(second == first, (first == 0).to(second.dtype), second)
    found = torch.stack((first, second))
    return found if token_ids is None else token_ids[found].to(torch.int64)


@jit
def _two(x: tl.tensor, token: tl.tensor) -> tl.tensor:
    """Of values and their tokens, which differ: the larger value and its token, and the next one's."""
    best = tl.max(x, 0)
    first = tl.min(tl.where(x == best, token, 2147483647), 0)
    rest = token != first
    next_best = tl.max(tl.where(rest, x, float("-inf")), 0)
    second = tl.min(tl.where(rest & (x == next_best), token, 2147483647), 0)
    return best, first, next_best, second


@jit
def _part_kernel(
    logits_ptr: tl.tensor,
    values_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    num_parts: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """A part of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * logits_stride + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))
    best, first, next_best, second = _two(x, token)
    place = (row * num_parts + part) * 2
    tl.store(values_ptr + place, best)
    tl.store(tokens_ptr + place, first)
    tl.store(values_ptr + place + 1, next_best)
    tl.store(tokens_ptr + place + 1, second)


@jit
def _row_kernel(
    values_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    found_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_values: tl.tensor,
    HAS_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A row a program."""
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    inside = place < num_values
    x = tl.load(values_ptr + row * num_values + place, mask=inside, other=float("-inf"))
    token = tl.load(tokens_ptr + row * num_values + place, mask=inside, other=2147483647)
    _, first, _, second = _two(x, token)
    if HAS_IDS:
        first = tl.load(token_ids_ptr + first)
        second = tl.load(token_ids_ptr + second)
    tl.store(found_ptr + row, first.to(tl.int64))
    tl.store(found_ptr + num_rows + row, second.to(tl.int64))


def two_largest_triton(logits: Tensor, token_ids: Tensor | None = None) -> Tensor:
    """`two_largest` in two launches."""
    num_rows, vocab_size = logits.shape
    num_parts = ceil_div(vocab_size, _BLOCK)
    size = (num_rows, 2 * num_parts)
    values = torch.empty(size, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(size, dtype=torch.int32, device=logits.device)
    found = torch.empty((2, num_rows), dtype=torch.int64, device=logits.device)
    _part_kernel[(num_rows, num_parts)](
        logits, values, tokens, logits.stride(0), vocab_size, num_parts, BLOCK=_BLOCK, num_warps=4
    )
    _row_kernel[(num_rows,)](
        values,
        tokens,
        tokens if token_ids is None else token_ids,
        found,
        num_rows,
        2 * num_parts,
        HAS_IDS=token_ids is not None,
        BLOCK=next_power_of_2(2 * num_parts),
        num_warps=1,
    )
    return found
