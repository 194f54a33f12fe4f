"""The kernel of what an EAGLE head begins with against float64, and of its rows against the step's own kernel: a head
that reads another token's embedding, or writes another's place, drafts badly and nothing says why."""

from __future__ import annotations

import pytest
import torch
import triton_testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_testing import DEVICE, FLOAT_TYPES, assert_close, poison

triton_testing.need_triton()

from quire.kernels.eagle_inputs import EagleNorms, eagle_inputs_triton, found_eagle_inputs_triton  # noqa: E402
from quire.kernels.step_inputs import StepInputs, StepSource, prepare_inputs_triton  # noqa: E402

EPS = 1e-5
VOCAB_SIZE = 50


def normalized(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


@given(
    rows=st.integers(0, 5),
    size=st.sampled_from([1, 64, 100]),
    dtype=st.sampled_from(FLOAT_TYPES),
    normed=st.booleans(),
    keep_normed=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=30)
def test_inputs_equal_their_definition(
    rows: int, size: int, dtype: torch.dtype, normed: bool, keep_normed: bool, seed: int
) -> None:
    """Each norm with its own weight, each half in its place, and the stream that the layer's output is added to."""
    torch.manual_seed(seed)
    embedding = torch.randn(VOCAB_SIZE, size, device=DEVICE).to(dtype)
    hidden = torch.cat((torch.randn(rows, size, device=DEVICE).to(dtype) * 4, poison(rows, 3, dtype=dtype)), 1)
    hidden, token_ids = hidden[:, :size], torch.randint(0, VOCAB_SIZE, (rows,), device=DEVICE)
    norms = EagleNorms(torch.rand(size, device=DEVICE) + 0.5, torch.rand(size, device=DEVICE), EPS) if normed else None
    residual = poison(rows, size, dtype=dtype)
    found = eagle_inputs_triton(token_ids, embedding, hidden, norms, residual, normed and keep_normed)
    assert found.shape == (rows, 2 * size)
    embedded, (left, right) = embedding[token_ids], found.split(size, 1)
    if norms is None or rows == 0:
        assert torch.equal(found, torch.cat((embedded, hidden), 1))
    else:
        for half, x, weight in ((left, embedded, norms.embedding), (right, hidden, norms.hidden)):
            assert_close(half, normalized(x.double(), weight.double()), normalized(x.float(), weight).to(dtype))
    assert torch.equal(residual, right if normed and keep_normed else hidden)


@pytest.mark.parametrize(("counts", "padding"), [([1], 0), ([1, 1, 1], 5), ([7, 1, 16, 3], 2)])
def test_rows_are_found_a_position_later(counts: list[int], padding: int) -> None:
    """The token after each of a step's rows, where it lies in the head's pages, and padding nowhere."""
    generator = torch.Generator().manual_seed(sum(counts))
    rows, size = sum(counts) + padding, 16
    tokens = torch.randint(0, VOCAB_SIZE, (6, 40), generator=generator, dtype=torch.int32).to(DEVICE)
    tables = torch.randperm(18, generator=generator).to(torch.int32).view(6, 3).to(DEVICE)
    query_start = torch.tensor([0, *counts, 0], device=DEVICE).cumsum(0).to(torch.int32)
    slots = torch.randperm(6, generator=generator)[: len(counts) + 1].to(torch.int32).to(DEVICE)
    starts = torch.randint(0, 20, (len(counts) + 1,), generator=generator, dtype=torch.int32).to(DEVICE)
    source = StepSource(query_start, slots, starts, tokens, tables, 16)
    expected, found = (
        StepInputs(poison(rows, dtype=torch.int32), poison(rows, dtype=torch.int32), poison(rows, dtype=torch.int64))
        for _ in range(2)
    )
    prepare_inputs_triton(source, expected, ahead=1)
    embedding = torch.randn(VOCAB_SIZE, size, device=DEVICE)
    hidden, fused = torch.randn(rows, size, device=DEVICE), poison(rows, size, dtype=torch.float32)
    inputs = found_eagle_inputs_triton(source, found, embedding, hidden, None, fused)
    assert torch.equal(found.token_ids, expected.token_ids) and torch.equal(found.positions, expected.positions)
    assert torch.equal(found.slot_mapping, expected.slot_mapping)
    assert torch.equal(inputs, torch.cat((embedding[expected.token_ids.long()], hidden), 1))
    assert torch.equal(fused, hidden)


def test_a_layout_that_the_kernel_cannot_read_is_refused() -> None:
    """Without it wrong strides give wrong drafts and no error."""
    embedding, hidden = torch.zeros(4, 8, device=DEVICE), torch.zeros(8, 8, device=DEVICE)
    token_ids = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="must be contiguous"):
        eagle_inputs_triton(token_ids, embedding, hidden.t(), None, hidden)
    with pytest.raises(ValueError, match="there must be 8 tokens"):
        eagle_inputs_triton(token_ids[:3], embedding, hidden, None, hidden.clone())
