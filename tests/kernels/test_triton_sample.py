"""The Triton kernels that draw tokens against the CPU's sampler and float64, interpreted and compiled."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import triton_testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_testing import DEVICE, FLOAT_TYPES, examples, poison

triton_testing.need_triton()

from quire.engine.sampler import SamplingRows, sample, uniforms  # noqa: E402
from quire.kernels.sample import SamplingParameters, sample_triton  # noqa: E402

NUM_SLOTS = 9
LENGTH = 40


@dataclass(frozen=True, slots=True)
class Row:
    """What one row asks for."""

    slot: int
    position: int = 3
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0


def draw(logits: Tensor, rows: list[Row], token_ids: Tensor | None = None) -> list[int]:
    """The tokens drawn; what lies in the slots of no row is poison."""
    slots = torch.tensor([row.slot for row in rows], dtype=torch.int32, device=DEVICE)
    held = [row for row in rows if row.slot >= 0]

    def by_slot(name: str, dtype: torch.dtype) -> Tensor:
        values = poison(NUM_SLOTS, dtype=dtype)
        for row in held:
            value = getattr(row, name)
            values[row.slot] = value - 2**64 if name == "seed" and value >= 2**63 else value
        return values

    parameters = SamplingParameters(
        by_slot("temperature", torch.float32),
        by_slot("top_p", torch.float32),
        by_slot("top_k", torch.int32),
        by_slot("min_p", torch.float32),
        by_slot("seed", torch.int64),
    )
    positions = torch.tensor([row.position for row in rows], device=DEVICE)
    if token_ids is None:
        token_ids = torch.zeros(NUM_SLOTS, LENGTH, dtype=torch.int32, device=DEVICE)
    before = token_ids.clone()
    tokens = poison(len(rows), dtype=torch.int64)
    sample_triton(logits.to(DEVICE), slots, positions, parameters, token_ids, tokens)
    drawn: list[int] = tokens.tolist()
    for row, token in zip(rows, drawn, strict=True):
        if row.slot >= 0:
            before[row.slot, row.position] = max(token, 0)
    assert torch.equal(token_ids, before)
    return drawn


def wrong_by(logits: Tensor, row: Row, token: int) -> float:
    """How far the row's uniform number is from the token's share of the distribution, in float64 by the textbook.

    Infinite if the token could not be drawn at all. Where top_p ends at a token's very edge both sides of it count.
    """
    return min(_wrong_by(logits, row, token, row.top_p * (1 + slack)) for slack in (-1e-6, 1e-6))


def _wrong_by(logits: Tensor, row: Row, token: int, top_p: float) -> float:
    p = torch.softmax(logits.double() / row.temperature, -1)
    order = torch.arange(len(p))
    kept = torch.ones(len(p), dtype=torch.bool)
    if row.top_p < 1 or row.top_k or row.min_p:
        order = torch.sort(logits.double(), descending=True, stable=True).indices
        p = p[order]
        kept = p >= row.min_p * p[0] * (1 - 1e-6)
        if row.top_k:
            kept &= torch.arange(len(p)) < row.top_k
        total = p[kept].sum() if row.top_k or row.min_p else 1.0
        if row.top_p < 1:
            kept &= p.cumsum(0) - p < top_p * total
    p = torch.where(kept, p, 0.0)
    ends = p.cumsum(0) / p.sum()
    at = int((order == token).nonzero())
    number = float(uniforms(np.array([row.seed], np.uint64), np.array([row.position], np.uint64))[0])
    if not kept[at]:
        return float("inf")
    return max(float(ends[at] - p[at] / p.sum()) - number, number - float(ends[at]), 0.0)


parameters = st.builds(
    Row,
    slot=st.just(0),
    position=st.integers(0, LENGTH - 1),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    top_p=st.sampled_from([1.0, 1.0, 0.05, 0.9, 0.999]),
    top_k=st.sampled_from([0, 0, 1, 5, 50, 700, 10**6]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=examples(10, 200), deadline=None)
@given(
    asked=st.lists(parameters, min_size=1, max_size=3),
    vocab_size=st.sampled_from([1, 2, 255, 257, 1000, 2100]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    dtype=st.sampled_from(FLOAT_TYPES),
    seed=st.integers(0, 2**32),
)
def test_draws_are_the_inverse_of_the_distribution(
    asked: list[Row], vocab_size: int, spread: float, dtype: torch.dtype, seed: int
) -> None:
    """Without it a GPU draws from another distribution than the one that was asked for, or other tokens than a CPU."""
    torch.manual_seed(seed)
    rows = [replace(row, slot=2 * index) for index, row in enumerate(asked)]
    logits = (torch.randn(len(rows), vocab_size) * spread).to(dtype)
    for index, token in enumerate(draw(logits, rows)):
        assert 0 <= token < vocab_size
        assert wrong_by(logits[index], rows[index], token) < 1e-5, rows[index]


@pytest.mark.parametrize(
    "row",
    [
        Row(0, top_p=0.8),
        Row(1, top_k=900, top_p=0.99),
        Row(2, top_k=2000),
        Row(3, min_p=0.01),
        Row(4, top_k=30, min_p=0.2, top_p=0.7),
        Row(5, temperature=30.0, top_p=0.5),
    ],
)
@pytest.mark.parametrize("levels", [0, 3])
def test_flat_distributions(row: Row, levels: int) -> None:
    """Without it draws go wrong where more tokens matter than are compared pairwise, or more of them are equal."""
    torch.manual_seed(row.slot)
    logits = torch.randn(1, 3000)
    if levels:
        logits = (logits * levels).clamp(-1, 1).round()
    assert wrong_by(logits[0], row, draw(logits, [row])[0]) < 1e-5


def test_the_same_tokens_as_on_a_cpu() -> None:
    """Without it a seed gives one output on a CPU and another on a GPU."""
    torch.manual_seed(0)
    logits = torch.randn(NUM_SLOTS, 500) * 3
    rows = [
        Row(slot, slot, 0.8, [1.0, 0.9, 1.0][slot % 3], [0, 0, 20][slot % 3], 0.0, 2**64 - 1 - slot)
        for slot in range(NUM_SLOTS)
    ]
    expected = sample(
        logits.clone(),
        SamplingRows(
            torch.tensor([row.temperature for row in rows]),
            torch.tensor([row.top_p for row in rows]),
            torch.tensor([row.top_k for row in rows]),
            torch.tensor([row.min_p for row in rows]),
            np.array([row.seed for row in rows], np.uint64),
            np.array([row.position for row in rows], np.uint64),
        ),
    )
    assert draw(logits, rows) == expected.tolist()


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("vocab_size", [1, 256, 700, 5000])
def test_greedy_takes_the_first_of_the_greatest(vocab_size: int, dtype: torch.dtype) -> None:
    """Without it greedy output on a GPU differs from a CPU's wherever two logits are equal."""
    torch.manual_seed(vocab_size)
    logits = (torch.randn(4, vocab_size) * 2).round().to(dtype)
    rows = [Row(slot, temperature=0.0) for slot in range(4)]
    assert draw(logits, rows) == logits.float().argmax(-1).tolist()


@pytest.mark.parametrize("row", [Row(0, temperature=0.0), Row(0), Row(0, top_p=0.5)])
def test_logits_that_say_nothing_draw_nothing(row: Row) -> None:
    """Without it a broken model's output looks like a real one, or a row that pads the batch writes somewhere."""
    logits = torch.randn(5, 600)
    logits[0, 500] = float("nan")
    logits[1] = -torch.inf
    logits[3, 3] = torch.inf
    logits[4, :599] = -torch.inf
    rows = [row, replace(row, slot=3), Row(-1), replace(row, slot=2), replace(row, slot=1)]
    assert draw(logits, rows) == [-1, -1, -1, -1, 599]


def test_what_cannot_be_read_is_refused() -> None:
    """Without it logits in another layout give other tokens and no error."""
    with pytest.raises(ValueError, match="contiguous along V"):
        draw(torch.zeros(300, 2, device=DEVICE).t(), [Row(0), Row(1)])


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs need a GPU")
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_a_captured_graph_serves_other_requests(dtype: torch.dtype) -> None:
    """Without it a graph may keep the parameters that it was captured with; and vocabularies of real sizes."""
    vocab_size, num_rows = 151936, 4
    values = SamplingParameters(
        *(torch.zeros(num_rows, dtype=t, device=DEVICE) for t in (torch.float32, torch.float32)),
        torch.zeros(num_rows, dtype=torch.int32, device=DEVICE),
        torch.zeros(num_rows, device=DEVICE),
        torch.zeros(num_rows, dtype=torch.int64, device=DEVICE),
    )
    logits = torch.zeros(num_rows, vocab_size, dtype=dtype, device=DEVICE)
    slots = torch.arange(num_rows, device=DEVICE)
    positions = torch.zeros(num_rows, dtype=torch.int64, device=DEVICE)
    token_ids = torch.zeros(num_rows, LENGTH, dtype=torch.int32, device=DEVICE)
    tokens = poison(num_rows, dtype=torch.int64)
    sample_triton(logits, slots, positions, values, token_ids, tokens)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_triton(logits, slots, positions, values, token_ids, tokens)
    for seed in range(40):
        torch.manual_seed(seed)
        kind = [{}, {"top_k": 50}, {"top_p": 0.95}, {"min_p": 0.05, "top_p": 0.9}, {"top_k": 5000, "top_p": 0.8}]
        rows = [Row(i, seed % LENGTH, [0.5, 1.0][i % 2], seed=seed * i, **kind[(seed + i) % 5]) for i in range(4)]
        for name in ("temperature", "top_p", "top_k", "min_p", "seed"):
            getattr(values, name).copy_(torch.tensor([getattr(row, name) for row in rows]))
        logits.copy_(torch.randn(num_rows, vocab_size) * [1, 3, 6][seed % 3])
        positions.fill_(seed % LENGTH)
        tokens.fill_(-77)
        graph.replay()
        for i, token in enumerate(tokens.tolist()):
            assert wrong_by(logits[i].float().cpu(), rows[i], token) < 1e-4, rows[i]
            assert int(token_ids[i, seed % LENGTH]) == token
