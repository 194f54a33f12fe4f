"""What a pass of drafting ends with, against sorting: a second choice that is the first again is a row of a step for
nothing, and one that is no token reads beyond a table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_testing import DEVICE, need_triton, poison

need_triton()

from quire.kernels.draft_passes import DraftPlaces  # noqa: E402
from quire.kernels.draft_tokens import DraftTokens, end_pass, end_pass_triton  # noqa: E402

PATHS = pytest.mark.parametrize("path", [end_pass, end_pass_triton], ids=["reference", "triton"])
PASSES, WIDTH = 3, 5


def kept(path, logits: Tensor, target_ids: Tensor | None, index: int, choices: int) -> tuple[Tensor, DraftTokens]:  # type: ignore[no-untyped-def]
    """What pass `index` leaves: the next one's tokens, and the drafts."""
    size = len(logits)
    places = DraftPlaces(
        hidden=poison(size, 1, dtype=torch.float32),
        token_ids=poison(size, dtype=torch.int64),
        slots=poison(size, dtype=torch.int32),
        steps=poison(PASSES, 4, dtype=torch.int32),
        # Everybody's own place, in an order of their own.
        targets=torch.arange(PASSES * WIDTH, device=DEVICE).flip(0).view(PASSES, WIDTH),
        beside=torch.arange(PASSES * WIDTH, device=DEVICE).view(WIDTH, PASSES).T.contiguous(),
        next_pass=torch.tensor([index + 1], device=DEVICE),
    )
    flat = (PASSES * WIDTH,)
    out = DraftTokens(
        poison(PASSES, choices, WIDTH, dtype=torch.int64),
        poison(*flat, dtype=torch.int32),
        poison(*flat, dtype=torch.int32),
    )
    path(logits, target_ids, places, out)
    for choice, (tokens, where) in enumerate(
        [(out.token_ids, places.targets), (out.siblings, places.beside)][:choices]
    ):
        drafts = out.drafts[index, choice, :size]
        assert torch.equal(tokens[where[index, :size]].long(), drafts)
        assert (tokens != -77).sum() == size
    assert (out.drafts != -77).sum() == choices * size
    assert choices == 2 or (out.siblings == -77).all()
    return places.token_ids, out


@PATHS
@given(
    vocab_size=st.sampled_from([2, 3, 130, 2048, 2049, 2050, 9000]),
    num_rows=st.integers(1, 3),
    distinct=st.sampled_from([1, 3, 10**6]),
    mapped=st.booleans(),
    choices=st.integers(1, 2),
    index=st.integers(0, PASSES - 1),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=30)
def test_the_first_of_the_largest(  # type: ignore[no-untyped-def]
    path, vocab_size: int, num_rows: int, distinct: int, mapped: bool, choices: int, index: int, seed: int
) -> None:
    """In any part of the vocabulary, both in one or not, and the lower token of equal ones; put where the step that
    verifies them reads them, and nowhere else."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, distinct, (num_rows, vocab_size), generator=generator).float()
    # As a row of a wider table.
    given_logits = torch.cat((logits, torch.full((num_rows, 3), 10.0**7)), 1).to(DEVICE)[:, :vocab_size]
    target_ids = torch.randperm(vocab_size, generator=generator) if mapped else None
    expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, :2].T
    if target_ids is not None:
        expected = target_ids[expected]
    next_tokens, out = kept(path, given_logits, None if target_ids is None else target_ids.to(DEVICE), index, choices)
    assert torch.equal(out.drafts[index, :, :num_rows].cpu(), expected[:choices])
    assert torch.equal(next_tokens.cpu(), expected[0])


@PATHS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("vocab_size", [2, 2049, 5000])
def test_logits_that_are_not_finite_still_name_two_tokens(path, value: float, vocab_size: int) -> None:  # type: ignore[no-untyped-def]
    """A model that is broken is told by its own draws; its head must not read where there is nothing."""
    logits = torch.full((1, vocab_size), value, device=DEVICE)
    logits[0, -1] = 1.0
    _, out = kept(path, logits, None, 0, 2)
    first, second = out.drafts[0, :, 0].tolist()
    assert first != second and 0 <= first < vocab_size and 0 <= second < vocab_size


def test_drafts_that_would_lie_elsewhere_are_refused() -> None:
    """Without it a third choice overwrites the next pass's first."""
    with pytest.raises(ValueError, match=r"\[passes, 1 or 2, any\]"):
        kept(end_pass_triton, torch.zeros(1, 4, device=DEVICE), None, 0, 3)
