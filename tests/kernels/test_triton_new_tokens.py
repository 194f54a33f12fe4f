"""A decode's rotary positions, page writes and attention in one launch against the two kernels that it stands for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton_testing
from hypothesis import example, given, settings
from hypothesis import strategies as st
from triton_testing import DEVICE, FLOAT_TYPES, compiled_for, examples

triton_testing.need_triton()

from attention_batches import PAGE_SIZE, make_batch, small_tiles  # noqa: E402

from quire.kernels.attention_new_tokens import attend_new_tokens_triton  # noqa: E402
from quire.kernels.attention_worklist import AttentionLimits, AttentionShape  # noqa: E402
from quire.kernels.paged_attention_triton import (  # noqa: E402
    paged_attention_triton,
    plan_attention_triton,
)
from quire.kernels.rotary import rotary_table  # noqa: E402
from quire.kernels.rotary_and_write import HeadNorm, rotary_and_write_triton  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@settings(max_examples=examples(20, 100), deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 15, 16, 17, 64, 65, 130]), min_size=1, max_size=4),
    kind=compiled_for(
        [(1, 1), (4, 2), (9, 3), (8, 1)],
        [16, 64, 80],
        FLOAT_TYPES,
        [0, 0, 1, 20],
        [0.0, 0.0, 2.0],
        [False, True],
        [1, 3, 20],
    ),
    seed=st.integers(0, 2**32),
)
@example([64], ((1, 1), 80, torch.float16, 20, 0.0, False, 3), 0)  # the last part of the window has no key
def test_equals_writing_first_and_attending_then(
    lengths: list[int],
    kind: tuple[tuple[int, int], int, torch.dtype, int, float, bool, int],
    seed: int,
) -> None:
    """Without it a decode on a GPU turns its token wrongly, loses it, or writes it into another's page."""
    heads, head_size, dtype, window, soft_cap, normed, splits = kind
    shape = AttentionShape(*heads, head_size, window)
    batch = make_batch([(1, length) for length in lengths], shape, dtype, seed)
    count = len(lengths)
    qkv = torch.randn(count, heads[0] + 2 * heads[1], head_size).to(dtype).to(DEVICE)
    table = rotary_table(140, 1.0 / 10000 ** (torch.arange(0, head_size, 2).float() / head_size)).to(DEVICE)
    weights = torch.randn(2, head_size).to(DEVICE)
    norm = HeadNorm(weights[0], weights[1], 1e-6) if normed else None
    positions = batch.context_lens - 1
    pages = batch.block_tables[batch.table_rows, (positions // PAGE_SIZE).long()].long()
    slots = pages * PAGE_SIZE + positions % PAGE_SIZE
    # What is not there yet is poison, as in a fresh page.
    for pool in (batch.key_pages, batch.value_pages):
        pool[pages, :, (positions % PAGE_SIZE).long()] = float("nan")
    keys, values = batch.key_pages.clone(), batch.value_pages.clone()
    plan = plan_attention_triton(
        batch.query_start, batch.context_lens, batch.block_tables, shape, AttentionLimits(count, count, 1),
        batch.table_rows, small_tiles(splits),
    )  # fmt: skip
    queries = rotary_and_write_triton(qkv, positions, table, slots, keys, values, norm)
    expected = paged_attention_triton(queries, keys, values, plan, soft_cap=soft_cap)
    for _ in range(2):
        out = attend_new_tokens_triton(
            qkv, table, norm, batch.key_pages, batch.value_pages, plan, soft_cap=soft_cap
        )  # fmt: skip
        torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        for found, wanted in ((batch.key_pages, keys), (batch.value_pages, values)):
            torch.testing.assert_close(found, wanted, rtol=TOLERANCE[dtype], atol=1e-5, equal_nan=True)


def test_what_it_is_not_made_for_is_refused() -> None:
    """Without it prompts, or groups, would be attended to as decodes are."""
    shape = AttentionShape(4, 2, 16)
    batch = make_batch([(1, 40), (3, 20)], shape, torch.float32, 0)
    table = rotary_table(64, torch.ones(8)).to(DEVICE)
    given = (batch.query_start, batch.context_lens, batch.block_tables, shape)
    plan = plan_attention_triton(*given, AttentionLimits(4, 2, 3), batch.table_rows)
    qkv = torch.zeros(4, 8, 16, device=DEVICE)
    with pytest.raises(ValueError, match="one query of each sequence"):
        attend_new_tokens_triton(qkv, table, None, batch.key_pages, batch.value_pages, plan)
    plan = replace(plan, lists=plan.lists[:1])
    with pytest.raises(ValueError, match="heads contiguous"):
        attend_new_tokens_triton(qkv[:, :7], table, None, batch.key_pages, batch.value_pages, plan)
    with pytest.raises(ValueError, match="table must be"):
        attend_new_tokens_triton(qkv, table[..., :8], None, batch.key_pages, batch.value_pages, plan)
