"""The kernels of where drafts are made, against a loop over sequences and passes: a draft in another's place is a token
in another's text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_testing import DEVICE, need_triton, poison

need_triton()

from quire.kernels.draft_passes import (  # noqa: E402
    DraftingSeqs,
    DraftPlaces,
    begin_drafts,
    begin_drafts_triton,
    begin_pass,
    begin_pass_triton,
    step_of,
)

SLOTS, SIZE, PASSES, PAGE_SIZE, PAGES, SIBLINGS, NOWHERE = 6, 20, 5, 4, 10, 7, 4444
LENGTH = PAGE_SIZE * PAGES
MOST = SLOTS  # sequences that the places have room for


def numbers(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def places_for(size: int) -> DraftPlaces:
    return DraftPlaces(
        hidden=poison(MOST, SIZE, dtype=torch.float32),
        token_ids=poison(MOST, dtype=torch.int64),
        slots=poison(MOST, dtype=torch.int32),
        steps=poison(PASSES, 4 * (MOST + 4), dtype=torch.int32),
        targets=poison(PASSES, MOST, dtype=torch.int64),
        beside=poison(PASSES, MOST, dtype=torch.int64),
        next_pass=poison(1, dtype=torch.int64),
    ).first(size)


@pytest.mark.parametrize("path", [begin_drafts, begin_drafts_triton], ids=["reference", "triton"])
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_where_every_draft_goes(path, data: st.DataObject) -> None:  # type: ignore[no-untyped-def]
    """Behind what was drawn last of the drafts that were right; what is no draft goes where nobody reads."""
    # Of each drawing sequence how many drafts the step verified, how many were right, and how many are wanted next.
    verified = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=SLOTS))
    right = [data.draw(st.integers(0, count)) for count in verified]
    wanted = sorted((data.draw(st.integers(0, PASSES)) for _ in verified), reverse=True)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    order = torch.randperm(len(verified), generator=generator).tolist()
    slot_of = torch.randperm(SLOTS, generator=generator)[: len(verified)].tolist()
    start_of = torch.randint(1, LENGTH - PASSES - 4, (len(verified),), generator=generator).tolist()
    if data.draw(st.booleans()):  # as far as a sequence can be
        start_of[0] = LENGTH - 1 - right[0]
        wanted[order.index(0)] = 0
        wanted.sort(reverse=True)
        order.append(order.pop(order.index(0)))
    draws = [(seq, place) for seq, count in enumerate(verified) for place in range(count + 1)]
    firsts = [draws.index((seq, 0)) for seq in order]
    accepted = poison(SLOTS, dtype=torch.int32)
    for seq, count in enumerate(verified):
        # A sequence without drafts has what an earlier step left.
        accepted[slot_of[seq]] = right[seq] if count else 99
    rows = torch.randperm(len(draws), generator=generator).to(torch.int32)
    drawn = torch.randint(0, 50000, (len(draws),), generator=generator)
    tables = torch.randperm(SLOTS * PAGES, generator=generator).to(torch.int32).view(SLOTS, PAGES)
    fused = torch.randn(len(draws), SIZE, generator=generator)
    seqs = DraftingSeqs(
        firsts=numbers(firsts),
        verified=numbers([verified[seq] for seq in order]),
        counts=numbers([sum(count > ahead for count in wanted) for ahead in range(PASSES)]),
        drawing_slots=numbers([slot_of[seq] for seq, _ in draws]),
        logit_rows=rows.to(DEVICE),
        positions=numbers([start_of[seq] + place for seq, place in draws]),
        drawn=drawn.to(DEVICE),
        accepted=accepted,
        block_tables=tables.to(DEVICE),
        page_size=PAGE_SIZE,
        nowhere=NOWHERE,
        length=LENGTH,
        num_siblings=SIBLINGS,
    )
    size = len(verified)
    out = places_for(size)
    path(seqs, fused.to(DEVICE), out)

    step = step_of(out.steps, size)
    assert int(out.next_pass) == 0
    for index, seq in enumerate(order):
        draw = draws.index((seq, right[seq]))
        assert torch.equal(out.hidden[index].cpu(), fused[int(rows[draw])])
        assert int(out.token_ids[index]) == int(drawn[draw]) and int(out.slots[index]) == slot_of[seq]
        for ahead in range(PASSES):
            there = ahead < wanted[index]
            position = start_of[seq] + right[seq] + ahead if there else 1
            place = int(tables[slot_of[seq], position // PAGE_SIZE]) * PAGE_SIZE + position % PAGE_SIZE
            assert int(step.slot_mapping[ahead, index]) == (place if there else NOWHERE)
            assert int(step.positions[ahead, index]) == position
            assert int(step.context_lens[ahead, index]) == position + 1
            column = min(position + 1, LENGTH - 1) if there else LENGTH - 1
            assert int(out.targets[ahead, index]) == slot_of[seq] * LENGTH + column
            assert int(out.beside[ahead, index]) == slot_of[seq] * SIBLINGS + (ahead if there else SIBLINGS - 1)
    for ahead in range(PASSES):
        count = sum(number > ahead for number in wanted)
        assert step.query_start[ahead].tolist() == [min(index, count) for index in range(size + 1)]


@pytest.mark.parametrize("path", [begin_pass, begin_pass_triton], ids=["reference", "triton"])
def test_passes_follow_one_another(path) -> None:  # type: ignore[no-untyped-def]
    """Without it a pass is made twice, or one behind what the last has left."""
    places = places_for(2)
    places.steps.copy_(torch.arange(places.steps.numel()).view(places.steps.shape))
    places.next_pass.zero_()
    step = poison(places.steps.shape[1], dtype=torch.int32)
    for index in range(PASSES):
        path(places, step)
        assert torch.equal(step, places.steps[index]) and int(places.next_pass) == index + 1


def test_a_layout_that_the_kernels_cannot_write_is_refused() -> None:
    """Without it a pass is told half of another's."""
    places = places_for(2)
    with pytest.raises(ValueError, match="as long as a row"):
        begin_pass_triton(places, poison(8, dtype=torch.int32))
