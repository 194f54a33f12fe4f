"""Paged attention on a CPU against a textbook's in float64: any mix of chunks and decodes, on scattered pages."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_testing import assert_close

from quire.kernels.paged_attention import paged_attention, plan_attention


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences as (queries, context length)."""

    seqs: list[tuple[int, int]]
    page_size: int
    queries: Tensor
    key_pages: Tensor
    value_pages: Tensor
    block_tables: Tensor

    @property
    def query_start(self) -> Tensor:
        return torch.tensor([0, *(count for count, _ in self.seqs)]).cumsum(0).to(torch.int32)

    @property
    def context_lens(self) -> Tensor:
        return torch.tensor([length for _, length in self.seqs], dtype=torch.int32)


def make_batch(
    seqs: list[tuple[int, int]], heads: tuple[int, int], head_size: int, page_size: int, dtype: torch.dtype, seed: int
) -> Batch:
    """Pages hold large numbers where nobody's tokens are: to see them is to be far off."""
    torch.manual_seed(seed)
    num_heads, num_kv_heads = heads
    num_pages = [-(-length // page_size) for _, length in seqs]
    order = torch.randperm(sum(num_pages) + 2)
    pools = [torch.full((len(order), num_kv_heads, page_size, head_size), 1e4, dtype=dtype) for _ in range(2)]
    # What stands behind a sequence's last page is any valid page.
    tables = torch.randint(0, len(order), (len(seqs), max(num_pages) + 1))
    for row, ((_, length), pages) in enumerate(zip(seqs, order[: sum(num_pages)].split(num_pages), strict=True)):
        tables[row, : len(pages)] = pages
        at = torch.arange(length)
        for pool in pools:
            pool[pages[at // page_size], :, at % page_size] = torch.randn(length, num_kv_heads, head_size).to(dtype)
    queries = torch.randn(sum(count for count, _ in seqs), num_heads, head_size).to(dtype)
    return Batch(seqs, page_size, queries, *pools, tables.to(torch.int32))


def definition(batch: Batch, window: int, precision: torch.dtype) -> Tensor:
    """softmax(q kᵀ / √D) v, query by query over the keys that it sees."""
    outs, row = [], 0
    for (count, length), table in zip(batch.seqs, batch.block_tables, strict=True):
        at = torch.arange(length)
        group = batch.queries.shape[1] // batch.key_pages.shape[1]
        keys, values = (
            pool[table[at // batch.page_size].long(), :, at % batch.page_size].to(precision).repeat_interleave(group, 1)
            for pool in (batch.key_pages, batch.value_pages)
        )
        for position in range(length - count, length):
            seen = slice(max(0, position - window + 1) if window else 0, position + 1)
            query = batch.queries[row].to(precision)
            weights = (torch.einsum("hd,khd->hk", query, keys[seen]) * query.shape[-1] ** -0.5).softmax(-1)
            outs.append(torch.einsum("hk,khd->hd", weights, values[seen]))
            row += 1
    return torch.stack(outs)


def check(batch: Batch, window: int = 0) -> None:
    num_kv_heads, dtype = batch.key_pages.shape[1], batch.key_pages.dtype
    plan = plan_attention(
        batch.query_start, batch.context_lens, batch.block_tables, num_kv_heads, batch.page_size, dtype, window
    )
    exact, by_torch = definition(batch, window, torch.float64), definition(batch, window, dtype)
    for _ in range(2):  # as for two layers: a plan must not be used up
        found = paged_attention(batch.queries, torch.cat((batch.key_pages, batch.value_pages), 1), plan)
        assert_close(found.to(dtype), exact, by_torch, 1e-5)


def sequences(queries: st.SearchStrategy[int], largest: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    sequence = st.tuples(queries, st.integers(0, largest)).map(lambda pair: (pair[0], sum(pair)))
    return st.lists(sequence, min_size=1, max_size=6)


HEADS = st.sampled_from([(1, 1), (4, 2), (9, 3), (4, 1), (2, 2)])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SEEDS = st.integers(0, 2**32)


@given(
    seqs=sequences(st.sampled_from([1, 1, 2, 3, 16, 37]), 80),
    heads=HEADS,
    head_size=st.sampled_from([4, 16]),
    page_size=st.sampled_from([4, 16]),
    dtype=DTYPES,
    window=st.sampled_from([0, 0, 1, 5, 16, 33, 1000]),
    seed=SEEDS,
)
@settings(deadline=None, max_examples=150)
def test_any_mix(
    seqs: list[tuple[int, int]],
    heads: tuple[int, int],
    head_size: int,
    page_size: int,
    dtype: torch.dtype,
    window: int,
    seed: int,
) -> None:
    """Some mix of chunks and decodes would attend to what it must not, or miss what it must see."""
    check(make_batch(seqs, heads, head_size, page_size, dtype, seed), window)


@given(seqs=sequences(st.just(1), 900), heads=HEADS, window=st.sampled_from([0, 100]), seed=SEEDS)
@settings(deadline=None, max_examples=30)
def test_decodes_of_very_different_lengths(
    seqs: list[tuple[int, int]], heads: tuple[int, int], window: int, seed: int
) -> None:
    """They are sorted into several batches: every row must get its own result back."""
    check(make_batch(seqs, heads, 4, 4, torch.float32, seed), window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [37, 2000])
def test_one_decode_sees_no_slot_past_its_end(dtype: torch.dtype, length: int) -> None:
    """One sequence alone needs no mask unless its last page has slots that it must not see."""
    check(make_batch([(1, length)], (2, 1), 8, 16, dtype, 0))


def test_a_window_reads_no_page_before_it() -> None:
    """A long context under a short window would cost as if there was none."""
    batch = make_batch([(1, 640), (3, 500)], (2, 1), 4, 16, torch.float32, 0)
    plan = plan_attention(batch.query_start, batch.context_lens, batch.block_tables, 1, 16, torch.float32, 32)
    (decode,), (chunk,) = plan.decodes, plan.prefills
    assert decode.pages.shape[1] == 2 and chunk.pages.shape[1] == 3
    check(batch, 32)


def test_a_window_of_more_than_the_context_changes_nothing() -> None:
    """Most requests are shorter than their model's window: they must not pay for a mask."""
    batch = make_batch([(20, 20), (1, 9)], (2, 1), 4, 16, torch.float32, 0)
    plan = plan_attention(batch.query_start, batch.context_lens, batch.block_tables, 1, 16, torch.float32, 32)
    assert plan.prefills[0].mask is None
    check(batch, 32)
