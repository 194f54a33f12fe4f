"""The Triton kernel that applies grammar masks, interpreted on a CPU and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
import triton_testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_testing import DEVICE, FLOAT_TYPES

triton_testing.need_triton()

from quire.kernels.token_mask import apply_token_mask_triton  # noqa: E402


def random_masks(allowed: Tensor) -> Tensor:
    """The bit fields of bool [M, V], with the bits past V set at random."""
    num_masks, vocab_size = allowed.shape
    num_words = -(-vocab_size // 32)
    padded = torch.rand(num_masks, num_words * 32) < 0.5
    padded[:, :vocab_size] = allowed
    words = (padded.view(num_masks, num_words, 32).long() << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@settings(max_examples=25, deadline=None)
@given(
    num_logits=st.integers(1, 5),
    vocab_size=st.sampled_from([1, 31, 32, 33, 64, 1000, 4096, 4097, 5000]),
    dtype=st.sampled_from(FLOAT_TYPES),
    rows=st.lists(st.integers(-1, 4), max_size=5),
    share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_only_forbidden_tokens_of_the_rows_named_change(
    num_logits: int, vocab_size: int, dtype: torch.dtype, rows: list[int], share: float, seed: int
) -> None:
    """Without it a constrained request may draw what its grammar forbids, or an unconstrained one be constrained."""
    torch.manual_seed(seed)
    rows = sorted({min(row, num_logits - 1) for row in rows})
    logits = torch.randn(num_logits, vocab_size, dtype=dtype)
    allowed = torch.rand(len(rows), vocab_size) < share
    expected = logits.clone()
    for index, row in enumerate(rows):
        if row >= 0:
            expected[row, ~allowed[index]] = -torch.inf
    out = logits.to(DEVICE)
    apply_token_mask_triton(out, torch.tensor(rows, device=DEVICE), random_masks(allowed).to(DEVICE))
    assert torch.equal(out.cpu(), expected)


def test_masks_of_another_vocabulary_are_refused() -> None:
    """Without it a mask made for another tokenizer is read past its end."""
    with pytest.raises(ValueError, match="masks must have 4 words for 100 tokens, not 3"):
        apply_token_mask_triton(
            torch.zeros(1, 100, device=DEVICE),
            torch.zeros(1, dtype=torch.int64, device=DEVICE),
            torch.zeros(1, 3, dtype=torch.int32, device=DEVICE),
        )
