"""The two most likely tokens, against sorting: a second choice that is the first again is a row of a step for nothing,
and one that is no token reads beyond a table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_testing import DEVICE, need_triton

need_triton()

from quire.kernels.two_largest import two_largest, two_largest_triton  # noqa: E402

PATHS = pytest.mark.parametrize("path", [two_largest, two_largest_triton], ids=["reference", "triton"])


@PATHS
@given(
    vocab_size=st.sampled_from([2, 3, 130, 2048, 2049, 2050, 9000]),
    num_rows=st.integers(1, 3),
    distinct=st.sampled_from([1, 3, 10**6]),
    mapped=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=30)
def test_the_first_of_the_largest(path, vocab_size: int, num_rows: int, distinct: int, mapped: bool, seed: int) -> None:  # type: ignore[no-untyped-def]
    """In any part of the vocabulary, both in one or not, and the lower token of equal ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, distinct, (num_rows, vocab_size), generator=generator).float()
    # As a row of a wider table.
    given_logits = torch.cat((logits, torch.full((num_rows, 3), 10.0**7)), 1).to(DEVICE)[:, :vocab_size]
    token_ids = torch.randperm(vocab_size, generator=generator) if mapped else None
    expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, :2].T
    if token_ids is not None:
        expected = token_ids[expected]
    found: Tensor = path(given_logits, None if token_ids is None else token_ids.to(DEVICE))
    assert found.dtype is torch.int64 and torch.equal(found.cpu(), expected)


@PATHS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("vocab_size", [2, 2049, 5000])
def test_logits_that_are_not_finite_still_name_two_tokens(path, value: float, vocab_size: int) -> None:  # type: ignore[no-untyped-def]
    """A model that is broken is told by its own draws; its head must not read where there is nothing."""
    logits = torch.full((1, vocab_size), value, device=DEVICE)
    logits[0, -1] = 1.0
    first, second = path(logits)[:, 0].tolist()
    assert first != second and 0 <= first < vocab_size and 0 <= second < vocab_size
