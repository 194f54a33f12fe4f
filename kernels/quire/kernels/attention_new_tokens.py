"""A few decodes' rotary positions, page writes and attention in one launch, where a launch costs as much as its work.

Whoever has the part with a sequence's end begins with the new token's key and value, which it writes into their
page; so nobody reads what another program of the same launch writes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.kernels.paged_attention_triton import NewTokens, TritonAttentionPlan, check_layout, launch_attention
from quire.kernels.pool_type import query_type
from quire.kernels.rotary_and_write import HeadNorm


def attend_new_tokens_triton(
    qkv: Tensor,
    table: Tensor,
    norm: HeadNorm | None,
    key_pages: Tensor,
    value_pages: Tensor,
    plan: TritonAttentionPlan,
    scale: float | None = None,
    soft_cap: float = 0.0,
) -> Tensor:
    """`rotary_and_write`, then `paged_attention_triton`, in one launch, for sequences of one query each.

    qkv [T, heads + 2 kv_heads, D]: queries, keys, values, row i of the sequence whose query it is; table from
    `rotary_table`; otherwise as those two. The plan must be one for decodes alone, without groups.
    """
    shape = plan.shape
    if plan.prefixes is not None or len(plan.lists) != 1:
        raise ValueError("only a plan for one query of each sequence, and without groups, attends to new tokens")
    if qkv.shape[1:] != (shape.num_heads + 2 * shape.num_kv_heads, shape.head_size) or qkv.stride()[1:] != (
        shape.head_size,
        1,
    ):
        raise ValueError(f"qkv must be [T, heads + 2 kv_heads, D] of {shape}, a token's heads contiguous")
    if table.shape[1:] != (2, 1, shape.head_size) or not table.is_contiguous():
        raise ValueError(f"table must be contiguous, [positions, 2, 1, {shape.head_size}]: it is {list(table.shape)}")
    size = (qkv.shape[0], shape.num_heads, shape.head_size)
    out = torch.empty(size, dtype=query_type(key_pages, qkv), device=qkv.device)
    check_layout(out, key_pages, value_pages, shape)
    scale = shape.head_size**-0.5 if scale is None else scale
    new = NewTokens(qkv, table, norm)
    launch_attention(plan.lists[0], out, key_pages, value_pages, out, plan, scale, soft_cap, False, 0, new)
    return out
