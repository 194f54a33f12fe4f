"""The step-input kernel against a loop over sequences and tokens: a row that reads another's token or page would show
as another model, and padding that is written as garbage in somebody's cache."""

from __future__ import annotations

import pytest
import torch
from triton_testing import DEVICE, need_triton, poison

need_triton()

from quire.kernels.step_inputs import StepInputs, StepSource, prepare_inputs, prepare_inputs_triton  # noqa: E402

PAGE_SIZE = 16
SLOTS, LENGTH = 9, 101


@pytest.mark.parametrize("prepare", [prepare_inputs, prepare_inputs_triton], ids=["reference", "triton"])
@pytest.mark.parametrize(
    ("counts", "padding_rows", "padding_seqs"),
    [([1], 0, 0), ([1, 1, 1], 5, 2), ([37, 1, 16, 3], 7, 1), ([100], 28, 0), ([2] * 9, 0, 7), ([5, 1], 1, 3)],
)
@pytest.mark.parametrize("ahead", [0, 1])
def test_every_row(prepare, ahead: int, counts: list[int], padding_rows: int, padding_seqs: int) -> None:
    """Chunks and decodes in any order, whatever stands in the slots of padding."""
    generator = torch.Generator().manual_seed(sum(counts) + padding_rows)
    tokens = torch.randint(1, 50000, (SLOTS, LENGTH), generator=generator, dtype=torch.int32)
    tables = torch.randperm(SLOTS * 7, generator=generator).to(torch.int32).view(SLOTS, 7)
    slots = torch.randperm(SLOTS, generator=generator)[: len(counts)].tolist()
    starts = [int(torch.randint(0, LENGTH - ahead - count + 1, (), generator=generator)) for count in counts]
    expected = [
        (
            int(tokens[slot, position]),
            position,
            int(tables[slot, position // PAGE_SIZE]) * PAGE_SIZE + position % PAGE_SIZE,
        )
        for slot, start, count in zip(slots, starts, counts, strict=True)
        for position in range(start + ahead, start + ahead + count)
    ] + [(0, 0, -1)] * padding_rows
    query_start = [0, *torch.tensor(counts).cumsum(0).tolist()] + [sum(counts)] * padding_seqs
    rows = sum(counts) + padding_rows
    out = StepInputs(poison(rows, dtype=torch.int32), poison(rows, dtype=torch.int32), poison(rows, dtype=torch.int64))
    numbers = [
        torch.tensor(values, dtype=torch.int32, device=DEVICE)
        for values in (query_start, slots + [SLOTS - 1] * padding_seqs, starts + [77] * padding_seqs)
    ]
    prepare(StepSource(*numbers, tokens.to(DEVICE), tables.to(DEVICE), PAGE_SIZE), out, ahead=ahead)
    found = zip(out.token_ids.tolist(), out.positions.tolist(), out.slot_mapping.tolist(), strict=True)
    assert list(found) == expected
