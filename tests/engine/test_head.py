"""The head's logits: exact where tokens are decided, for any number of rows."""

from __future__ import annotations

import pytest
import torch

from quire.engine.models.head import Head
from quire.engine.models.linear import PlainLinear


@pytest.mark.parametrize("vocab_size", [100, 1000, 4096])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_leaders_are_exact(vocab_size: int, rows: int) -> None:
    """bfloat16 rounds the largest logits most. A prompt's chunk that is not its last wants no logits at all."""
    torch.manual_seed(rows)
    weight = torch.randn(vocab_size, 64).to(torch.bfloat16)
    hidden = torch.randn(rows, 64)
    logits = Head(PlainLinear(weight), weight)(hidden)
    exact = hidden @ weight.to(torch.float32).t()
    assert logits.shape == (rows, vocab_size) and logits.dtype is torch.float32
    torch.testing.assert_close(logits, exact, rtol=0.02, atol=0.3)
    best = exact.max(-1)
    assert torch.equal(logits.argmax(-1), best.indices)
    torch.testing.assert_close(logits.max(-1).values, best.values)
