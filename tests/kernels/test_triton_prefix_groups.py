"""Attention that reads a shared prefix once: the groups that are found, and what it computes with them."""

from __future__ import annotations

import pytest
import torch
import triton_testing
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_testing import DEVICE, FLOAT_TYPES, assert_close, compiled_for, examples

triton_testing.need_triton()

from attention_batches import PAGE_SIZE, Batch, by_torch, definition, make_batch, small_tiles  # noqa: E402

from quire.kernels.attention_worklist import AttentionLimits, AttentionShape, Tile  # noqa: E402
from quire.kernels.paged_attention_triton import paged_attention_triton, plan_attention_triton  # noqa: E402
from quire.kernels.prefix_groups import PrefixGroups, group_prefixes  # noqa: E402

MIN_PAGES = 2
MIN_MEMBERS = 2


def share_pages(batch: Batch, families: list[int], shared_pages: list[int]) -> None:
    """Sequences of a family begin with its first member's pages, as many as each has and `shared_pages` says."""
    first: dict[int, int] = {}
    for index, (family, pages) in enumerate(zip(families, shared_pages, strict=True)):
        leader = first.setdefault(family, index)
        lengths = [batch.seqs[i][1] - batch.seqs[i][0] for i in (leader, index)]
        pages = min(pages, *(length // PAGE_SIZE for length in lengths))
        own, led = (int(batch.table_rows[i]) for i in (index, leader))
        batch.block_tables[own, :pages] = batch.block_tables[led, :pages]


def find(batch: Batch, max_tokens: int) -> PrefixGroups:
    return group_prefixes(
        batch.query_start, batch.context_lens, batch.block_tables, batch.table_rows, PAGE_SIZE, max_tokens, MIN_PAGES,
        MIN_MEMBERS,
    )  # fmt: skip


def check_groups(batch: Batch, groups: PrefixGroups) -> None:
    """Every group's rows are its members', once each, and all have its pages; and nothing that could share is alone."""
    prefix_lens, starts = groups.prefix_lens.tolist(), groups.row_start.tolist()
    rows_of = {
        index: list(range(int(batch.query_start[index]), int(batch.query_start[index + 1])))
        for index in range(len(batch.seqs))
    }
    tables = batch.block_tables[batch.table_rows]
    seen: list[int] = []
    for leader in range(len(batch.seqs)):
        rows = groups.rows[starts[leader] : starts[leader + 1]].tolist()
        members = [index for index in rows_of if rows_of[index] and rows_of[index][0] in rows]
        assert rows == [row for index in members for row in rows_of[index]]
        seen += members
        if not members:
            continue
        length = int(groups.lengths[leader])
        assert len(members) >= MIN_MEMBERS and length >= MIN_PAGES * PAGE_SIZE and length % PAGE_SIZE == 0
        assert groups.table_rows[leader] == batch.table_rows[leader]
        for index in members:
            assert prefix_lens[index] == length <= batch.seqs[index][1] - batch.seqs[index][0]
            assert torch.equal(tables[index, : length // PAGE_SIZE], tables[leader, : length // PAGE_SIZE])
    assert len(seen) == len(set(seen))
    assert all(length == 0 for index, length in enumerate(prefix_lens) if index not in seen)
    keys: dict[int, int] = {}
    for index, (count, length) in enumerate(batch.seqs):
        if index not in seen and (length - count) // PAGE_SIZE >= MIN_PAGES:
            key = int(tables[index, MIN_PAGES - 1])
            keys[key] = keys.get(key, 0) + 1
    assert all(count < MIN_MEMBERS for count in keys.values())


@settings(max_examples=examples(12, 150), deadline=None)
@given(
    seqs=st.lists(
        st.tuples(
            st.tuples(st.sampled_from([1, 1, 1, 3, 20]), st.sampled_from([0, 20, 40, 64, 100, 130])),
            st.integers(0, 2),
            st.integers(0, 8),
        ),
        min_size=1,
        max_size=7,
    ),
    kind=compiled_for([(4, 2), (9, 3), (4, 1)], [16, 80], FLOAT_TYPES, [0.0, 2.0], [1, 8]),
    seed=st.integers(0, 2**32),
)
def test_shared_prefixes_change_nothing_but_the_reading(
    seqs: list[tuple[tuple[int, int], int, int]],
    kind: tuple[tuple[int, int], int, torch.dtype, float, int],
    seed: int,
) -> None:
    """Without it sequences that begin alike may lose keys, count them twice, or read those of another group."""
    heads, head_size, dtype, soft_cap, splits = kind
    shape = AttentionShape(*heads, head_size)
    batch = make_batch([(count, count + before) for (count, before), _, _ in seqs], shape, dtype, seed)
    share_pages(batch, [family for _, family, _ in seqs], [pages for _, _, pages in seqs])
    total = len(batch.queries)
    limits = AttentionLimits(max(total, 20), len(seqs), 20)
    groups = find(batch, limits.max_tokens)
    check_groups(batch, groups)
    plan = plan_attention_triton(
        batch.query_start, batch.context_lens, batch.block_tables, shape, limits, batch.table_rows,
        small_tiles(splits), groups, Tile(16, 16, 1, 2, splits, 16),
    )  # fmt: skip
    exact, torch_out = definition(batch, shape, torch.float64, soft_cap), by_torch(batch, shape, soft_cap)
    for _ in range(2):
        out = paged_attention_triton(batch.queries, batch.key_pages, batch.value_pages, plan, soft_cap=soft_cap)
        assert_close(out, exact, torch_out)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_tiles_of_real_launches(dtype: torch.dtype) -> None:
    """Without it the tile that groups get may be wrong where those of the other tests are right."""
    shape = AttentionShape(8, 2, 128)
    batch = make_batch([(1, 300 + 7 * index) for index in range(5)] + [(1, 50)], shape, dtype, 0)
    share_pages(batch, [0] * 6, [18] * 6)
    groups = group_prefixes(batch.query_start, batch.context_lens, batch.block_tables, batch.table_rows, PAGE_SIZE, 16)
    assert groups.prefix_lens.tolist() == [288] * 5 + [0]
    plan = plan_attention_triton(
        batch.query_start, batch.context_lens, batch.block_tables, shape, AttentionLimits(16, 8, 4), batch.table_rows,
        groups=groups,
    )  # fmt: skip
    out = paged_attention_triton(batch.queries, batch.key_pages, batch.value_pages, plan)
    assert_close(out, definition(batch, shape, torch.float64, 0.0), by_torch(batch, shape, 0.0))


def test_sequences_that_pad_a_graph_are_in_no_group() -> None:
    """Without it a graph that is not full groups padding, or reads a block table that does not exist."""
    shape = AttentionShape(4, 2, 64)
    batch = make_batch([(1, 90), (1, 80), (1, 70)], shape, torch.float32, 0)
    share_pages(batch, [0, 0, 0], [4, 4, 4])
    total = len(batch.queries)
    starts = torch.cat((batch.query_start, torch.full((4,), total, dtype=torch.int32, device=DEVICE)))
    lens = torch.cat((batch.context_lens, torch.full((4,), 10**6, dtype=torch.int32, device=DEVICE)))
    rows = torch.cat((batch.table_rows, torch.full((4,), 10**6, device=DEVICE)))
    groups = group_prefixes(starts, lens, batch.block_tables, rows, PAGE_SIZE, 32, MIN_PAGES, MIN_MEMBERS)
    assert groups.prefix_lens.tolist() == [64, 64, 64, 0, 0, 0, 0]
    assert groups.row_start.tolist() == [0] + [3] * 7
    limits = AttentionLimits(32, 8, 32)
    plan = plan_attention_triton(starts, lens, batch.block_tables, shape, limits, rows, small_tiles(3), groups)
    queries = torch.cat((batch.queries, torch.full((9, 4, 64), torch.nan, device=DEVICE)))
    out = paged_attention_triton(queries, batch.key_pages, batch.value_pages, plan)[:total]
    assert_close(out, definition(batch, shape, torch.float64, 0.0), definition(batch, shape, torch.float32, 0.0))


def test_groups_that_a_layer_cannot_use_are_refused() -> None:
    """Without it a layer with a window attends to what it must not see."""
    shape = AttentionShape(4, 2, 64, window=8)
    batch = make_batch([(1, 40)], shape, torch.float32, 0)
    for refused, limits in ((shape, AttentionLimits(4, 1, 4)), (AttentionShape(4, 2, 64), AttentionLimits(9, 1, 4))):
        with pytest.raises(ValueError, match="groups must have room for"):
            plan_attention_triton(
                batch.query_start, batch.context_lens, batch.block_tables, refused, limits, batch.table_rows,
                groups=find(batch, 4),
            )  # fmt: skip
    with pytest.raises(ValueError, match="not 0 among 4"):
        group_prefixes(batch.query_start, batch.context_lens, batch.block_tables, None, PAGE_SIZE, 4, 0)
