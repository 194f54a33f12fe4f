"""Scatters a step's keys and values into the pages of the KV pool.

A page's layout is [heads, page_size, head_size]: one head's keys of a page are contiguous, so gathering a sequence's
pages yields what a matrix product per head wants. The CPU engine keeps keys and values in one page, as heads of it: one
operation writes both. Idea: Kwon et al., "Efficient Memory Management for Large Language
Model Serving with PagedAttention", SOSP 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class WritePlan:
    """Where a step's tokens go; the same for every layer, so made once a step."""

    rows: Tensor  # int64 [T × heads], indexes into the pool seen as [pages × heads × page_size, head_size]
    fresh_pages: Tensor | None  # int64, pages whose first slot is written in this step


def plan_writes(slot_mapping: Tensor, num_heads: int, page_size: int) -> WritePlan:
    """slot_mapping int64 [T]: page × page_size + offset; `num_heads` is a page's."""
    pages = slot_mapping.div(page_size, rounding_mode="floor")
    offsets = slot_mapping - pages * page_size
    heads = torch.arange(num_heads)
    rows = ((pages.unsqueeze(1) * num_heads + heads) * page_size + offsets.unsqueeze(1)).flatten()
    fresh = pages[offsets == 0]
    return WritePlan(rows, fresh if fresh.numel() else None)


def write_pages(new: Tensor, pages: Tensor, plan: WritePlan) -> None:
    """new [T, heads, D] of any float type, keys or values or both; pages [P, heads, page_size, D], written in place.

    A fresh page is cleared first. Attention reads whole pages and gives slots that are not yet written the weight 0,
    which makes nothing of whatever finite numbers stand there; but 0 × inf, left by a page's last owner, is NaN.
    """
    if plan.fresh_pages is not None:
        pages.index_fill_(0, plan.fresh_pages, 0)
    head_size = pages.shape[-1]
    pages.view(-1, head_size).index_copy_(0, plan.rows, new.reshape(-1, head_size).type(pages.dtype))
