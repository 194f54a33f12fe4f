"""Trees of drafts on the device, against loops and float64: a leaf that sees the draft beside it, or is kept where it
was not drawn, makes another model's text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_testing import DEVICE, assert_close, compiled_for, examples, need_triton, poison

need_triton()

from attention_batches import PAGE_SIZE, by_torch, definition, make_batch, small_tiles  # noqa: E402

from quire.kernels.attention_worklist import AttentionLimits, AttentionShape  # noqa: E402
from quire.kernels.draft_trees import (  # noqa: E402
    DraftTrees,
    LeafMoves,
    PagedLayers,
    keep_siblings,
    keep_siblings_triton,
    move_tokens,
    move_tokens_triton,
)
from quire.kernels.paged_attention_triton import paged_attention_triton, plan_attention_triton  # noqa: E402
from quire.kernels.step_inputs import StepInputs, StepSource, prepare_inputs, prepare_inputs_triton  # noqa: E402

SLOTS = 40
PATHS = pytest.mark.parametrize("path", [0, 1], ids=["reference", "triton"])


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@st.composite
def trees(draw: st.DrawFn, most: int = 6) -> tuple[int, int]:
    """A trunk and its leaves."""
    trunk = draw(st.integers(0, most))
    return trunk, draw(st.integers(0, trunk))


@st.composite
def verified_trees(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """A tree, how many tokens of its trunk are right, and which leaf is drawn instead of the next."""
    trunk, leaves = draw(trees(20))
    return trunk, leaves, draw(st.integers(0, trunk)), draw(st.integers(0, leaves))


@PATHS
@given(drawn_trees=st.lists(verified_trees(), min_size=1, max_size=8), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_a_leaf_is_kept_where_it_was_drawn(path: int, drawn_trees: list[tuple[int, int, int, int]], seed: int) -> None:
    """One that is drawn in another place than its own, or behind the first wrong token, must not be."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(SLOTS, generator=generator)[: len(drawn_trees)].tolist()
    inputs: list[int] = [0]  # a row that belongs to nobody
    drawn: list[int] = []
    rows: list[int] = []
    firsts: list[int] = []
    positions: list[int] = []
    accepted = [-7] * SLOTS
    moves = []
    expected_accepted, expected_text = [-7] * SLOTS, torch.full((SLOTS, 64), -5)
    expected_drawn: list[int] = []
    for slot, (trunk, leaves, right, leaf) in zip(slots, drawn_trees, strict=True):
        first, row, start = len(drawn), len(inputs), slot % 9
        firsts.append(first)
        rows += range(row, row + 1 + trunk + leaves)
        inputs += [1, *(100 + place for place in range(trunk)), *(200 + place for place in range(leaves))]
        positions += [start + 1 + place for place in range(trunk + 1)] + [start + 2 + place for place in range(leaves)]
        after_trunk = [100 + place for place in range(trunk)] + [17]
        after_trunk[right] = 200 + leaf if right < trunk else 17
        after_leaves = [300 + place for place in range(leaves)]
        drawn += after_trunk + after_leaves
        hit = leaves > 0 and right == leaf < min(leaves, trunk)
        accepted[slot] = expected_accepted[slot] = right
        if hit:
            expected_accepted[slot] += 1
            after_trunk[right + 1] = 300 + leaf
            moves.append((row + 1 + trunk + leaf, row + right + 1))
        else:
            moves.append((row, row) if leaves else (0, 0))
        expected_drawn += after_trunk + after_leaves
        if leaves:
            expected_text[slot, start + 1 : start + 2 + trunk] = torch.tensor(after_trunk)
    padding = [0] * 3
    tree = DraftTrees(
        int32([trunk for trunk, *_ in drawn_trees] + padding),
        int32([leaves for _, leaves, *_ in drawn_trees] + padding),
        int32([]).view(0, 0),
    )
    counts, text = int32(accepted), torch.full((SLOTS, 64), -5, dtype=torch.int32, device=DEVICE)
    tokens = torch.tensor(drawn, device=DEVICE)
    found = LeafMoves(*(poison(len(slots) + 3, dtype=torch.int32) for _ in range(2)))
    keep = (keep_siblings, keep_siblings_triton)[path]
    keep(
        tree, int32([*slots, *padding]), int32([*firsts, 10**6, 10**6, 10**6]), int32(rows), int32(positions),
        int32(inputs), tokens, text, counts, found,
    )  # fmt: skip
    assert counts.tolist() == expected_accepted
    assert tokens.tolist() == expected_drawn
    assert torch.equal(text.cpu(), expected_text.to(torch.int32))
    assert list(zip(found.sources.tolist(), found.targets.tolist(), strict=True)) == [*moves, *[(0, 0)] * 3]


@PATHS
@pytest.mark.parametrize(("dtype", "head_size"), [(torch.float32, 8), (torch.bfloat16, 80)])
def test_a_kept_leaf_moves_in_all_layers(path: int, dtype: torch.dtype, head_size: int) -> None:
    """And nothing else does: pages are shared, and the others' tokens are right."""
    generator = torch.Generator().manual_seed(head_size)
    layers = [torch.randn(5, 3, PAGE_SIZE, head_size, generator=generator).to(dtype).to(DEVICE) for _ in range(4)]
    places = [3, 15, 16, 40, 41, 79, 20]
    expected = [pages.clone() for pages in layers]
    for pages in expected:
        for source, target in ((15, 16), (79, 41)):
            pages[target // 16, :, target % 16] = pages[source // 16, :, source % 16]
    move = (move_tokens, move_tokens_triton)[path]
    moves = LeafMoves(int32([1, 3, 5, 0]), int32([2, 3, 4, 0]))
    move(moves, torch.tensor(places, device=DEVICE), PagedLayers.of(layers[:2], layers[2:]))
    assert all(map(torch.equal, layers, expected))


@PATHS
def test_leaves_have_rows_of_their_own(path: int) -> None:
    """Their tokens come from the table, their places are behind the trunk, their positions beside it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 50000, (4, 100), generator=generator, dtype=torch.int32)
    tables = torch.randperm(28, generator=generator).to(torch.int32).view(4, 7)
    siblings = torch.randint(1, 50000, (4, 9), generator=generator, dtype=torch.int32)
    # Slots, starts, trunks, leaves and rows in all; the last two are a prompt and padding.
    slots, starts, trunks, leaves, counts = [2, 0, 3, 1], [13, 50, 0, 9], [4, 3, 0, 5], [2, 3, 0, 5], [7, 7, 5, 0]
    expected = []
    for slot, start, trunk, leaf, count in zip(slots, starts, trunks, leaves, counts, strict=True):
        for row in range(count):
            place, index = start + row, row - (count - leaf)
            token = tokens[slot, place] if index < 0 else siblings[slot, index]
            slot_place = int(tables[slot, place // PAGE_SIZE]) * PAGE_SIZE + place % PAGE_SIZE
            expected.append((int(token), place - (trunk if index >= 0 else 0), slot_place))
    expected += [(0, 0, -1)] * 3
    rows = len(expected)
    out = StepInputs(poison(rows, dtype=torch.int32), poison(rows, dtype=torch.int32), poison(rows, dtype=torch.int64))
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    prepare = (prepare_inputs, prepare_inputs_triton)[path]
    tree = DraftTrees(int32(trunks), int32(leaves), siblings.to(DEVICE))
    given_step = int32(ends), int32(slots), int32(starts), tokens.to(DEVICE), tables.to(DEVICE)
    prepare(StepSource(*given_step, PAGE_SIZE), out, tree)
    found = zip(out.token_ids.tolist(), out.positions.tolist(), out.slot_mapping.tolist(), strict=True)
    assert list(found) == expected


# A tree, and how much text is before it; or a prompt's tokens as if they were one's trunk, without leaves.
sequences = st.lists(
    st.tuples(st.one_of(trees(), st.tuples(st.integers(0, 39), st.just(0))), st.sampled_from([0, 1, 15, 16, 60, 100])),
    min_size=1,
    max_size=3,
)


@settings(max_examples=examples(12, 100), deadline=None)
@given(
    seqs=sequences,
    kind=compiled_for(
        [(1, 1), (4, 2), (9, 3), (3, 3)],
        [16, 80],
        [torch.float32, torch.float16],
        [0, 0, 3, 20],
        [1, 3, 20],
        [1, 3, 13],
    ),
    seed=st.integers(0, 2**32),
)
def test_a_leaf_sees_what_is_before_it(
    seqs: list[tuple[tuple[int, int], int]], kind: tuple[tuple[int, int], int, torch.dtype, int, int, int], seed: int
) -> None:
    """Not the trunk beside it, nor other leaves: in any tile, part and window, beside prompts and decodes."""
    heads, head_size, dtype, window, splits, decode_query_len = kind
    shape = AttentionShape(*heads, head_size, window)
    counts = [1 + trunk + leaves for (trunk, leaves), _ in seqs]
    batch = make_batch(
        [(count, count + before) for count, (_, before) in zip(counts, seqs, strict=True)], shape, dtype, seed
    )
    limits = AttentionLimits(max(sum(counts), 40), len(seqs), 40, decode_query_len)
    given_trees = [tree for tree, _ in seqs]
    tree = DraftTrees(
        int32([trunk for trunk, _ in given_trees]), int32([leaves for _, leaves in given_trees]), int32([]).view(0, 0)
    )
    plan = plan_attention_triton(
        batch.query_start, batch.context_lens, batch.block_tables, shape, limits, batch.table_rows,
        small_tiles(splits, 64 if decode_query_len * shape.group > 16 else 16), trees=tree,
    )  # fmt: skip
    out = paged_attention_triton(batch.queries, batch.key_pages, batch.value_pages, plan)
    exact = definition(batch, shape, torch.float64, 0.0, given_trees)
    assert_close(out[: len(exact)], exact, by_torch(batch, shape, 0.0, given_trees))
    assert all(not work.arrivals.any() for work in plan.lists)
