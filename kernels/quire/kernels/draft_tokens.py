"""The end of a pass of drafting: the most likely token of each row of logits, and where asked for the second.

Logits are read once, by many programs a row, each of which leaves the two largest of its part; a second launch finds
the two largest of those, and puts them wherever they are wanted. Of equal ones the first in the vocabulary is the
larger; a NaN counts as +inf.
"""
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels._triton import (
    ceil_div,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    may_overlap,
    next_power_of_2,
    overlap_option,
    tl,
)
from quire.kernels.draft_passes import DraftPlaces
from quire.kernels.vocab_blocks import check_logits

_BLOCK = 2048


@dataclass(frozen=True, slots=True)
class DraftTokens:
    """Where drafts go: of N sequences in P passes, `choices` of each, one or two."""

    drafts: Tensor  # int64 [P, choices, N or more]
    token_ids: Tensor  # int32, the slots' tokens, flat: first choices go to `DraftPlaces.targets`
    siblings: Tensor  # int32, the slots' siblings, flat: second choices go to `DraftPlaces.beside`


def end_pass(logits: Tensor, target_ids: Tensor | None, places: DraftPlaces, out: DraftTokens) -> None:
    """Keeps the drafts of the pass that `begin_pass` began; first choices are also the next pass's tokens.

    logits [N, V] of any float type, V ≥ 2; where int `target_ids` [V] is given, drafts are its entries.
    """
    check_logits(logits)
    if logits.is_cuda:
        end_pass_triton(logits, target_ids, places, out)
        return
    size, index = len(logits), int(places.next_pass) - 1
    rows = torch.where(logits.isnan(), torch.inf, logits)
    first = rows.argmax(-1)
    second = rows.scatter(1, first[:, None], -torch.inf).argmax(-1)
    # A row may hold nothing but -inf elsewhere.
    second = torch.where(second == first, (first == 0).to(second.dtype), second)
    found = torch.stack((first, second))[: out.drafts.shape[1]]
    found = found if target_ids is None else target_ids[found].to(torch.int64)
    out.drafts[index, :, :size] = found
    places.token_ids.copy_(found[0])
    out.token_ids[places.targets[index, :size]] = found[0].to(torch.int32)
    if len(found) > 1:
        out.siblings[places.beside[index, :size]] = found[1].to(torch.int32)


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
    DEPENDENT: tl.constexpr,
) -> None:
    """A part of a row a program."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
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
    target_ids_ptr: tl.tensor,
    next_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    beside_ptr: tl.tensor,
    next_tokens_ptr: tl.tensor,
    drafts_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    siblings_ptr: tl.tensor,
    drafts_stride: tl.tensor,
    targets_stride: tl.tensor,
    num_values: tl.tensor,
    CHOICES: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """A row a program."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    index = tl.load(next_ptr) - 1
    place = tl.arange(0, BLOCK)
    inside = place < num_values
    x = tl.load(values_ptr + row * num_values + place, mask=inside, other=float("-inf"))
    token = tl.load(tokens_ptr + row * num_values + place, mask=inside, other=2147483647)
    _, first, _, second = _two(x, token)
    if HAS_IDS:
        first = tl.load(target_ids_ptr + first)
        second = tl.load(target_ids_ptr + second)
    drafts = drafts_ptr + index * (CHOICES * drafts_stride) + row
    tl.store(drafts, first.to(tl.int64))
    tl.store(next_tokens_ptr + row, first.to(tl.int64))
    tl.store(token_ids_ptr + tl.load(targets_ptr + index * targets_stride + row), first.to(tl.int32))
    if CHOICES > 1:
        tl.store(drafts + drafts_stride, second.to(tl.int64))
        tl.store(siblings_ptr + tl.load(beside_ptr + index * targets_stride + row), second.to(tl.int32))


def end_pass_triton(logits: Tensor, target_ids: Tensor | None, places: DraftPlaces, out: DraftTokens) -> None:
    """`end_pass` in two launches."""
    num_rows, vocab_size = logits.shape
    _, num_choices, width = out.drafts.shape
    if not out.drafts.is_contiguous() or num_choices not in (1, 2):
        raise ValueError(f"drafts must be contiguous, [passes, 1 or 2, any], and are {list(out.drafts.shape)}")
    num_parts = ceil_div(vocab_size, _BLOCK)
    size = (num_rows, 2 * num_parts)
    values = torch.empty(size, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(size, dtype=torch.int32, device=logits.device)
    overlaps = may_overlap(logits.device)
    _part_kernel[(num_rows, num_parts)](
        logits, values, tokens, logits.stride(0), vocab_size, num_parts, BLOCK=_BLOCK, DEPENDENT=overlaps,
        num_warps=4, **overlap_option(overlaps),
    )  # fmt: skip
    _row_kernel[(num_rows,)](
        values,
        tokens,
        tokens if target_ids is None else target_ids,
        places.next_pass,
        places.targets,
        places.beside,
        places.token_ids,
        out.drafts,
        out.token_ids,
        out.siblings,
        width,
        places.targets.stride(0),
        2 * num_parts,
        CHOICES=num_choices,
        HAS_IDS=target_ids is not None,
        BLOCK=next_power_of_2(2 * num_parts),
        DEPENDENT=overlaps,
        num_warps=1,
        **overlap_option(overlaps),
    )
