"""What follows drafts on the device, against loops: a count that is wrong puts a sequence's next tokens in other places
than its last ones, or repeats them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_testing import DEVICE, need_triton

need_triton()

from quire.kernels.drafts import (  # noqa: E402
    count_accepted,
    count_accepted_triton,
    follow_drafts,
    follow_drafts_triton,
)

SLOTS = 300
PATHS = pytest.mark.parametrize("path", [0, 1], ids=["reference", "triton"])


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


# Of each sequence: how many drafts it has, rows in front of them, and how many of them are right.
SEQUENCES = st.lists(
    st.tuples(st.integers(0, 64), st.integers(0, 3), st.integers(0, 64)), min_size=1, max_size=9
) | st.just([(3, 0, 1)] * 270)


@PATHS
@given(sequences=SEQUENCES, seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_the_first_wrong_draft_ends_the_count(path: int, sequences: list[tuple[int, int, int]], seed: int) -> None:
    """A right one behind it must not count, and slots without drafts keep what they have."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(SLOTS, generator=generator)[: len(sequences)].tolist()
    tokens: list[int] = []
    drawn: list[int] = []
    rows: list[int] = []
    firsts: list[int] = []
    expected = [-7] * SLOTS
    for slot, (num_drafts, before, right) in zip(slots, sequences, strict=True):
        tokens += [1] * (before + 1)
        firsts.append(len(drawn))
        for place in range(num_drafts + 1):
            rows.append(len(tokens) - 1)
            # Behind the wrong one all are right again.
            drawn.append(-1 if place == right else 100 + place)
            if place < num_drafts:
                tokens.append(100 + place)
        if num_drafts:
            expected[slot] = min(right, num_drafts)
    accepted = int32([-7] * SLOTS)
    count = (count_accepted, count_accepted_triton)[path]
    drafts = int32([num_drafts for num_drafts, _, _ in sequences] + [0] * 3)
    padded = int32([*slots, 0, 0, 0])
    drawn_there = torch.tensor([*drawn, 100, 100], device=DEVICE)
    count(padded, int32([*firsts, 0, 0, 0]), drafts, int32([*rows, 0, 0]), drawn_there, int32(tokens), accepted)
    assert accepted.tolist() == expected


@PATHS
@given(sequences=SEQUENCES, seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_a_sequence_moves_with_all_that_says_where_it_is(
    path: int, sequences: list[tuple[int, int, int]], seed: int
) -> None:
    """One whose host knows where it stands must not move, whatever was counted for its slot before."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(SLOTS, generator=generator)[: len(sequences)].tolist()
    accepted = torch.randint(0, 60, (SLOTS,), generator=generator, dtype=torch.int32).to(DEVICE)
    moves = [int(accepted[slot]) if num_open else 0 for slot, (num_open, _, _) in zip(slots, sequences, strict=True)]
    items = [item for item, (_, draws, _) in enumerate(sequences) for _ in range(draws)]
    num_open = int32([num_open for num_open, _, _ in sequences] + [0, 0])
    starts, lens = int32([*range(len(sequences)), 5, 5]), int32([*range(9, 9 + len(sequences)), 0, 0])
    positions, draw_items = int32([*range(len(items)), 8]), int32([*items, 0])
    expected_positions = [place + moves[item] for place, item in enumerate(items)]
    follow = (follow_drafts, follow_drafts_triton)[path]
    follow(num_open, int32([*slots, 0, 0]), accepted, starts, lens, draw_items, positions)
    assert starts.tolist() == [i + move for i, move in enumerate(moves)] + [5, 5]
    assert lens.tolist() == [9 + i + move for i, move in enumerate(moves)] + [0, 0]
    assert positions.tolist()[: len(items)] == expected_positions
