"""The Triton kernels of paged attention against float64, interpreted on a CPU and compiled on a GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import triton_testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_testing import DEVICE, FLOAT_TYPES, assert_close, compiled_for, examples, poison

triton_testing.need_triton()

from attention_batches import PAGE_SIZE, Batch, by_torch, definition, make_batch, small_tiles  # noqa: E402

from quire.kernels.attention_worklist import AttentionLimits, AttentionShape, Tile  # noqa: E402
from quire.kernels.paged_attention_triton import paged_attention_triton, plan_attention_triton  # noqa: E402


def check(
    batch: Batch,
    shape: AttentionShape,
    limits: AttentionLimits,
    tiles: tuple[Tile, Tile] | None = None,
    soft_cap: float = 0.0,
    layers: int = 2,
) -> None:
    plan = plan_attention_triton(
        batch.query_start, batch.context_lens, batch.block_tables, shape, limits, batch.table_rows, tiles
    )
    exact = definition(batch, shape, torch.float64, soft_cap)
    torch_out = by_torch(batch, shape, soft_cap)
    for _ in range(layers):
        out = paged_attention_triton(batch.queries, batch.key_pages, batch.value_pages, plan, soft_cap=soft_cap)
        assert_close(out[: len(exact)], exact, torch_out)
    assert all(not work.arrivals.any() for work in plan.lists)


sequences = st.lists(
    st.tuples(st.sampled_from([1, 1, 2, 3, 5, 17, 40]), st.sampled_from([0, 0, 1, 15, 16, 17, 60, 100])).map(
        lambda seq: (seq[0], seq[0] + seq[1])
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=examples(25, 100), deadline=None)
@given(
    seqs=sequences,
    kind=compiled_for(
        [(1, 1), (4, 2), (9, 3), (4, 1), (3, 3)],
        [16, 64, 80],
        FLOAT_TYPES,
        [0, 0, 1, 20, 64],
        [0.0, 0.0, 2.0],
        [1, 3, 20],
        [1, 3],
    ),
    seed=st.integers(0, 2**32),
)
def test_any_mix_of_sequences(
    seqs: list[tuple[int, int]],
    kind: tuple[tuple[int, int], int, torch.dtype, int, float, int, int],
    seed: int,
) -> None:
    """Without it some mix of prefill, verification and decode on a GPU may attend to what it must not, or miss what it
    must see."""
    heads, head_size, dtype, window, soft_cap, splits, decode_query_len = kind
    shape = AttentionShape(*heads, head_size, window)
    batch = make_batch(seqs, shape, dtype, seed)
    total = sum(count for count, _ in seqs)
    limits = AttentionLimits(max(total, 40), len(seqs), 40, decode_query_len)
    check(batch, shape, limits, small_tiles(splits), soft_cap)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("seqs", [[(1, 700)], [(1, 5), (1, 130), (1, 64)], [(150, 150)], [(70, 300), (1, 200), (4, 9)]])
def test_tiles_of_real_launches(seqs: list[tuple[int, int]], dtype: torch.dtype) -> None:
    """Without it the tile sizes that the engine uses may be wrong where those of the other tests are right."""
    shape = AttentionShape(8, 2, 128)
    check(make_batch(seqs, shape, dtype, 0), shape, AttentionLimits(256, 4, 150), layers=1)


# 64, 80 and 128 are those of the tests above.
@pytest.mark.parametrize("head_size", [96, 256])
def test_head_sizes(head_size: int) -> None:
    """Without it a model with an unusual head size reads its neighbour head's elements."""
    shape = AttentionShape(4, 2, head_size)
    batch = make_batch([(1, 40), (20, 37)], shape, torch.float16, 0)
    check(batch, shape, AttentionLimits(32, 2, 32), small_tiles(4), layers=1)


def test_a_part_that_a_query_does_not_see_gives_nothing() -> None:
    """Without it what is hidden from a query has a weight, which compiled code, where a product and a sum are rounded
    once, may make infinite."""
    shape = AttentionShape(4, 2, 64)
    batch = make_batch([(20, 37)], shape, torch.float32, 0)
    plan = plan_attention_triton(
        batch.query_start, batch.context_lens, batch.block_tables, shape, AttentionLimits(32, 1, 32), batch.table_rows,
        small_tiles(20),
    )  # fmt: skip
    paged_attention_triton(batch.queries, batch.key_pages, batch.value_pages, plan)
    work = plan.lists[1]
    hidden = [
        (slot + part, query * shape.group)
        for _, _, position, count, begin, _, slot, part, _ in work.items[: int(work.count)].tolist()
        for query in range(count)
        if position + query < begin
    ]
    assert hidden
    for slot, row in hidden:
        assert (work.lses[slot, :, row] == -1e30).all() and not work.partials[slot, :, row].any()


def test_a_launch_made_for_more_serves_fewer() -> None:
    """Without it a captured graph that is not full may read a padding sequence, or write its result somewhere."""
    shape = AttentionShape(4, 2, 64)
    batch = make_batch([(1, 90), (6, 30), (1, 3)], shape, torch.float32, 0)
    total = len(batch.queries)
    padding = torch.full((5,), total, dtype=torch.int32, device=DEVICE)
    lens = torch.full((5,), 10**6, dtype=torch.int32, device=DEVICE)
    plan = plan_attention_triton(
        torch.cat((batch.query_start, padding)),
        torch.cat((batch.context_lens, lens)),
        batch.block_tables,
        shape,
        AttentionLimits(64, 8, 64),
        torch.cat((batch.table_rows, torch.full((5,), 10**6, device=DEVICE))),
        small_tiles(6),
    )
    queries = torch.cat((batch.queries, poison(20, 4, 64, dtype=torch.float32)))
    out = paged_attention_triton(queries, batch.key_pages, batch.value_pages, plan)[:total]
    assert_close(out, definition(batch, shape, torch.float64, 0.0), definition(batch, shape, torch.float32, 0.0))


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs need a GPU")
def test_a_captured_graph_serves_other_batches() -> None:
    """Without it something of the batch at capture may be baked into the graph that every later step replays."""
    shape = AttentionShape(8, 2, 128)
    dtype = torch.bfloat16
    mixes = [[(1, 3000), (1, 20), (5, 700)], [(90, 90), (1, 1), (3, 5)], [(1, 1), (1, 5000), (100, 2100)]]
    batches = [make_batch(seqs, shape, dtype, seed) for seed, seqs in enumerate(mixes)]
    limits = AttentionLimits(128, 3, 128, 4)
    queries = torch.zeros(128, 8, 128, dtype=dtype, device=DEVICE)
    most = max(len(batch.key_pages) for batch in batches)
    keys, values = (torch.zeros(most, 2, PAGE_SIZE, 128, dtype=dtype, device=DEVICE) for _ in range(2))
    query_start, lens = (torch.zeros(size, dtype=torch.int32, device=DEVICE) for size in (4, 3))
    tables = torch.zeros(5, most, dtype=torch.int32, device=DEVICE)
    rows = torch.zeros(3, dtype=torch.int64, device=DEVICE)

    def step() -> Tensor:
        return paged_attention_triton(
            queries, keys, values, plan_attention_triton(query_start, lens, tables, shape, limits, rows)
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for batch in [*batches, *batches]:
        total = len(batch.queries)
        queries[:total] = batch.queries
        keys[: len(batch.key_pages)], values[: len(batch.key_pages)] = batch.key_pages, batch.value_pages
        query_start.copy_(batch.query_start)
        lens.copy_(batch.context_lens)
        tables[:, : batch.block_tables.shape[1]] = batch.block_tables
        rows.copy_(batch.table_rows)
        graph.replay()
        assert_close(out[:total], definition(batch, shape, torch.float64, 0.0), definition(batch, shape, dtype, 0.0))


def test_a_step_without_sequences_does_nothing() -> None:
    """Without it a graph that runs with an empty batch, as at its capture, may read memory that nobody set."""
    shape = AttentionShape(4, 2, 64)
    pages = poison(2, 2, PAGE_SIZE, 64, dtype=torch.float32)
    zeros = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    plan = plan_attention_triton(zeros, zeros[:3], zeros.view(2, 2), shape, AttentionLimits(8, 3, 8))
    assert [int(work.count) for work in plan.lists] == [0, 0]
    paged_attention_triton(poison(8, 4, 64, dtype=torch.float32), pages, pages, plan)


# An item costs the interpreter two milliseconds, so there are few of them.
@settings(max_examples=30, deadline=None)
@given(
    seqs=st.lists(
        st.tuples(st.sampled_from([1, 1, 3, 4, 5, 33, 70]), st.integers(0, 500)).map(lambda s: (s[0], sum(s))),
        min_size=1,
        max_size=5,
    ),
    kind=compiled_for([(4, 2), (9, 3), (32, 8)], [1, 7, 40], [1, 4], [0, 100]),
    few=st.booleans(),
)
def test_the_list_covers_all_keys_once_and_fits(
    seqs: list[tuple[int, int]], kind: tuple[tuple[int, int], int, int, int], few: bool
) -> None:
    """Without it some batch's list overruns its buffers, or leaves out or counts twice some keys."""
    heads, programs, decode_query_len, window = kind
    shape = AttentionShape(*heads, 64, window)
    starts = torch.tensor([0, *(count for count, _ in seqs)]).cumsum(0)
    total = int(starts[-1])
    num_chunks = sum(count > decode_query_len for count, _ in seqs)
    limits = AttentionLimits(max(total, 70), len(seqs), 70, decode_query_len, num_chunks if few else None)
    tiles = (Tile(64, 32, 1, 2, programs, 32), Tile(32, 16, 1, 2, programs, 64))
    lens = torch.tensor([length for _, length in seqs], dtype=torch.int32, device=DEVICE)
    tables = torch.zeros(len(seqs), 1, dtype=torch.int32, device=DEVICE)
    plan = plan_attention_triton(starts.to(torch.int32).to(DEVICE), lens, tables, shape, limits, tiles=tiles)
    read: dict[int, list[tuple[int, int]]] = {}
    for work in plan.lists:
        assert int(work.count) <= len(work.items)
        slots = set()
        for seq, row, position, count, begin, end, slot, part, parts in work.items[: int(work.count)].tolist():
            assert slot == -1 if parts == 1 else slot >= 0
            if parts > 1:
                assert slot + part < len(work.partials) and slot + part not in slots
                slots.add(slot + part)
            assert position - (seqs[seq][1] - seqs[seq][0]) == row - int(starts[seq])
            for query in range(count):
                read.setdefault(row + query, []).append((begin, min(end, position + query + 1)))
    for seq, (count, length) in enumerate(seqs):
        for query in range(count):
            last = length - count + query
            ranges = sorted(span for span in read.pop(int(starts[seq]) + query) if span[0] < span[1])
            assert ranges[-1][1] == last + 1
            assert ranges[0][0] <= (max(0, last - window + 1) if window else 0)
            assert all(before[1] == after[0] for before, after in pairwise(ranges))
    assert not read


def test_what_a_launch_cannot_serve_is_refused() -> None:
    """Without it a wrong size becomes wrong numbers instead of an error that names it."""
    zeros = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads"):
        plan_attention_triton(zeros, zeros[:3], zeros.view(2, 2), AttentionShape(9, 2, 64), AttentionLimits(8, 3, 8))
    with pytest.raises(ValueError, match="window must be 0"):
        AttentionShape(4, 2, 64, -1)
    with pytest.raises(ValueError, match="min_part must be a multiple of keys"):
        Tile(16, 64, 4, 3, 4, 100)
    with pytest.raises(ValueError, match="do not hold"):
        AttentionLimits(max_tokens=8, max_seqs=3, max_query_len=9)
    shape = AttentionShape(4, 2, 64)
    with pytest.raises(ValueError, match="16 queries of 2 heads do not fit a tile of 16 rows"):
        plan_attention_triton(
            zeros, zeros[:3], zeros.view(2, 2), shape, AttentionLimits(64, 3, 64, 16), tiles=small_tiles(1)
        )
    with pytest.raises(ValueError, match="there are 3 sequences, and the limit is 2"):
        plan_attention_triton(zeros, zeros[:3], zeros.view(2, 2), shape, AttentionLimits(8, 2, 8))
    plan = plan_attention_triton(zeros, zeros[:3], zeros.view(2, 2), shape, AttentionLimits(8, 3, 8))
    pages = torch.zeros(2, 2, PAGE_SIZE, 64, device=DEVICE)
    with pytest.raises(ValueError, match="scale must be positive"):
        paged_attention_triton(torch.zeros(8, 4, 64, device=DEVICE), pages, pages, plan, scale=0.0)
    with pytest.raises(ValueError, match=r"queries must be \[T, 4, 64\]"):
        paged_attention_triton(torch.zeros(8, 4, 32, device=DEVICE), pages, pages, plan)
    with pytest.raises(ValueError, match="must be contiguous"):
        paged_attention_triton(torch.zeros(4, 8, 64, device=DEVICE).transpose(0, 1), pages, pages, plan)
