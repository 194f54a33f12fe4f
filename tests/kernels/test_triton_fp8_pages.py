"""Keys and values in FP8: written, and attended to, against float64 over the very pages that were stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton_testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_testing import DEVICE, FLOAT_TYPES, assert_close, compiled_for, examples

triton_testing.need_triton()

from attention_batches import PAGE_SIZE, Batch, by_torch, definition, make_batch, small_tiles  # noqa: E402

from quire.kernels.attention_new_tokens import attend_new_tokens_triton  # noqa: E402
from quire.kernels.attention_worklist import AttentionLimits, AttentionShape  # noqa: E402
from quire.kernels.paged_attention_triton import paged_attention_triton, plan_attention_triton  # noqa: E402
from quire.kernels.pool_type import FP8  # noqa: E402
from quire.kernels.rotary import rotary_table  # noqa: E402
from quire.kernels.rotary_and_write import HeadNorm, rotary_and_write, rotary_and_write_triton  # noqa: E402

# Half of the last place: of the mantissa, and of the smallest numbers.
RELATIVE, ABSOLUTE = 1.01 * 2.0**-4, 2.0**-9
# Of numbers that lie in the thousands.
TURNED = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def in_fp8(batch: Batch) -> tuple[Batch, Tensor, Tensor]:
    """A batch's pages as they are stored, and the batch with what these hold."""
    keys, values = batch.key_pages.to(FP8), batch.value_pages.to(FP8)
    return replace(batch, key_pages=keys.to(torch.float32), value_pages=values.to(torch.float32)), keys, values


@settings(max_examples=examples(12, 100), deadline=None)
@given(
    seqs=st.lists(st.sampled_from([(1, 1), (1, 17), (1, 130), (5, 20), (40, 57)]), min_size=1, max_size=4),
    kind=compiled_for(
        [(1, 1), (4, 2), (9, 3), (8, 1)], [16, 64, 80], FLOAT_TYPES, [0, 0, 20], [0.0, 2.0], [1, 3, 20], [16, 64]
    ),
    seed=st.integers(0, 2**32),
)
def test_any_mix_of_sequences(
    seqs: list[tuple[int, int]], kind: tuple[tuple[int, int], int, torch.dtype, int, float, int, int], seed: int
) -> None:
    """Without it attention may read FP8 as something else, or compute in it: its error must be that of its own type,
    the pages' rounding aside."""
    heads, head_size, dtype, window, soft_cap, splits, rows = kind
    shape = AttentionShape(*heads, head_size, window)
    batch, keys, values = in_fp8(make_batch(seqs, shape, dtype, seed))
    limits = AttentionLimits(max(len(batch.queries), 40), len(seqs), 40)
    plan = plan_attention_triton(
        batch.query_start, batch.context_lens, batch.block_tables, shape, limits, batch.table_rows,
        small_tiles(splits, rows),
    )  # fmt: skip
    out = paged_attention_triton(batch.queries, keys, values, plan, soft_cap=soft_cap)
    assert out.dtype is dtype
    exact = definition(batch, shape, torch.float64, soft_cap)
    assert_close(out[: len(exact)], exact, by_torch(batch, shape, soft_cap))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_queries_of_any_size(soft_cap: float) -> None:
    """Without it a query that float16 does not hold becomes infinite, or zero, or so does another in its tile."""
    shape = AttentionShape(8, 2, 64)
    batch, keys, values = in_fp8(make_batch([(1, 130), (5, 40)], shape, torch.bfloat16, 0))
    # Scores of more than 2^24 would be too large for any type's sums.
    sizes = 2.0 ** torch.tensor([-90, -30, -12, 0, 0, 4, 12, 18], device=DEVICE)
    batch = replace(batch, queries=batch.queries * sizes[:, None].to(torch.bfloat16))
    plan = plan_attention_triton(
        batch.query_start, batch.context_lens, batch.block_tables, shape, AttentionLimits(6, 2, 5, 5),
        batch.table_rows, small_tiles(1, 32),
    )  # fmt: skip
    out = paged_attention_triton(batch.queries, keys, values, plan, soft_cap=soft_cap)
    # The interpreter cuts bfloat16 where hardware rounds.
    exact = definition(batch, shape, torch.float64, soft_cap)
    torch.testing.assert_close(out.double(), exact, rtol=2.0**-7, atol=2.0**-9)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_what_is_written(dtype: torch.dtype) -> None:
    """Without it a key may be rounded twice, or a large one become NaN, with which all that follow are lost; queries
    keep their type. The torch reference does the same."""
    torch.manual_seed(0)
    qkv = (torch.randn(20, 4 + 2 * 2, 64) * torch.logspace(-4, 4, 20)[:, None, None]).to(dtype)
    table = rotary_table(64, 1.0 / 10000 ** (torch.arange(0, 64, 2).float() / 64))
    positions, slots = torch.arange(20), torch.randperm(4 * PAGE_SIZE)[:20]
    given = (positions, table, slots)
    wide, byte, narrow = (
        [torch.zeros(4, 2, PAGE_SIZE, 64, dtype=pool) for _ in range(2)] for pool in (torch.float32, FP8, FP8)
    )
    expected = rotary_and_write(qkv.float(), *given, *wide)
    assert torch.equal(rotary_and_write(qkv.float(), *given, *byte), expected)
    pages = [page.to(DEVICE) for page in narrow]
    out = rotary_and_write_triton(*(x.to(DEVICE) for x in (qkv, *given)), *pages)
    torch.testing.assert_close(out.cpu(), expected.to(dtype), rtol=TURNED[dtype], atol=1e-2)
    for exact, by_kernel, by_reference in zip(wide, (page.cpu() for page in pages), byte, strict=True):
        cut = exact.clamp(-448, 448)
        assert cut.abs().max() == 448
        torch.testing.assert_close(by_reference.float(), cut, rtol=RELATIVE, atol=ABSOLUTE)
        right = torch.ones_like(cut, dtype=torch.bool) if DEVICE == "cuda" else interpreted_right(cut)
        assert right.float().mean() > 0.8
        torch.testing.assert_close(by_kernel.float()[right], cut[right], rtol=RELATIVE, atol=ABSOLUTE)


def interpreted_right(numbers: Tensor) -> Tensor:
    """Where Triton's interpreter rounds to FP8 as hardware does: it makes 0 of the smallest, and where a mantissa is
    rounded up to 2 it forgets the exponent."""
    mantissa, _ = torch.frexp(numbers.abs())
    return (numbers == 0) | ((numbers.abs() >= 2.0**-6) & (2 * mantissa < 1.93))


@settings(max_examples=examples(8, 30), deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 16, 17, 64, 130]), min_size=1, max_size=4),
    kind=compiled_for([(1, 1), (4, 2), (9, 3)], FLOAT_TYPES, [False, True], [1, 3]),
    seed=st.integers(0, 2**32),
)
def test_few_decodes_are_as_many(
    lengths: list[int], kind: tuple[tuple[int, int], torch.dtype, bool, int], seed: int
) -> None:
    """Without it a token's own key would count with more digits than later ones find in its page: what a request says
    would depend on how many run beside it."""
    heads, dtype, normed, splits = kind
    head_size, count = 64, len(lengths)
    shape = AttentionShape(*heads, head_size)
    batch, keys, values = in_fp8(make_batch([(1, length) for length in lengths], shape, dtype, seed))
    qkv = (8 * torch.randn(count, heads[0] + 2 * heads[1], head_size)).to(dtype).to(DEVICE)
    table = rotary_table(140, 1.0 / 10000 ** (torch.arange(0, head_size, 2).float() / head_size)).to(DEVICE)
    weights = torch.randn(2, head_size).to(DEVICE)
    norm = HeadNorm(weights[0], weights[1], 1e-6) if normed else None
    positions = batch.context_lens - 1
    own = batch.block_tables[batch.table_rows, (positions // PAGE_SIZE).long()].long()
    slots = own * PAGE_SIZE + positions % PAGE_SIZE
    plan = plan_attention_triton(
        batch.query_start, batch.context_lens, batch.block_tables, shape, AttentionLimits(count, count, 1),
        batch.table_rows, small_tiles(splits),
    )  # fmt: skip
    once = [pages.clone() for pages in (keys, values)]
    queries = rotary_and_write_triton(qkv, positions, table, slots, keys, values, norm)
    expected = paged_attention_triton(queries, keys, values, plan)
    out = attend_new_tokens_triton(qkv, table, norm, *once, plan)
    assert out.dtype is expected.dtype is dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    # A key that lies between two numbers may go either way where it is turned by other instructions.
    for found, wanted in zip(once, (keys, values), strict=True):
        same = found.view(torch.uint8) == wanted.view(torch.uint8)
        torch.testing.assert_close(found.float()[~same], wanted.float()[~same], rtol=2 * RELATIVE, atol=ABSOLUTE)
    if all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(once, (keys, values), strict=True)):
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=8 * tolerance)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's FP8 has no NaN")
def test_nan_stays_nan() -> None:
    """Without it a broken weight gives plausible nonsense instead of an error."""
    qkv = torch.full((1, 3, 64), float("nan"), device=DEVICE)
    pages = [torch.zeros(1, 1, PAGE_SIZE, 64, device=DEVICE).to(FP8) for _ in range(2)]
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    rotary_and_write_triton(qkv, zero, rotary_table(4, torch.ones(32)).to(DEVICE), zero, *pages)
    assert all(page.float()[0, 0, 0].isnan().all() for page in pages)
