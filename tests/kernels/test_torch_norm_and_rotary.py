"""The CPU kernels that work on single tokens against written-out float64: RMS norm, rotary positions, page writes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_testing import assert_close

from quire.kernels.rms_norm import add_rms_norm, rms_norm
from quire.kernels.rotary import rotary, rotary_table
from quire.kernels.write_pages import plan_writes, write_pages

FLOATS = st.sampled_from([torch.float32, torch.bfloat16])
SEEDS = st.integers(0, 2**32)


def normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Row by row, as the paper has it, in float64."""
    rows = [row / (sum(v * v for v in row.tolist()) / len(row) + eps) ** 0.5 for row in x.double().flatten(0, -2)]
    return torch.stack(rows).view_as(x) * weight.double()


@given(
    rows=st.integers(1, 5),
    size=st.integers(1, 70),
    scale=st.sampled_from([1e-4, 1.0, 300.0]),
    eps=st.sampled_from([1e-6, 1e-5]),
    dtype=FLOATS,
    seed=SEEDS,
)
@settings(deadline=None)
def test_rms_norm(rows: int, size: int, scale: float, eps: float, dtype: torch.dtype, seed: int) -> None:
    """Every layer begins with it: a mean over the wrong dimension or a lost epsilon is a model that drifts."""
    torch.manual_seed(seed)
    x, weight = scale * torch.randn(rows, size), torch.randn(size)
    exact = normalized(x, weight, eps)
    before = x.clone()
    assert_close(rms_norm(x, weight, eps, dtype), exact, exact.to(dtype))
    assert torch.equal(x, before)


@given(heads=st.integers(1, 4), size=st.sampled_from([8, 16]), seed=SEEDS)
@settings(deadline=None)
def test_rms_norm_per_head(heads: int, size: int, seed: int) -> None:
    """Queries and keys are normalized in one call with a weight for each head: they must not be mixed."""
    torch.manual_seed(seed)
    x, weight = torch.randn(3, heads + 2, size)[:, :heads], torch.randn(heads, size)
    exact = normalized(x.contiguous(), weight, 1e-6)
    assert_close(rms_norm(x, weight, 1e-6, torch.float32), exact, exact.float())


@given(size=st.integers(1, 40), added=FLOATS, dtype=FLOATS, seed=SEEDS)
@settings(deadline=None)
def test_add_rms_norm(size: int, added: torch.dtype, dtype: torch.dtype, seed: int) -> None:
    """The residual stream is changed in place: a layer that adds to a copy is a layer that is left out."""
    torch.manual_seed(seed)
    residual, x, weight = torch.randn(3, size), torch.randn(3, size).to(added), torch.randn(size)
    total = residual + x.float()
    out = add_rms_norm(residual, x, weight, 1e-6, dtype)
    assert torch.equal(residual, total)
    exact = normalized(total, weight, 1e-6)
    assert_close(out, exact, exact.to(dtype))


@given(
    half=st.integers(1, 40),
    heads=st.integers(1, 3),
    positions=st.lists(st.integers(0, 500), min_size=1, max_size=6),
    dtype=FLOATS,
    seed=SEEDS,
)
@settings(deadline=None)
def test_rotary_turns_pairs(half: int, heads: int, positions: list[int], dtype: torch.dtype, seed: int) -> None:
    """The order of halves and the sign of the turn are a convention that the weights were trained with."""
    torch.manual_seed(seed)
    x, inv_freq = torch.randn(len(positions), heads, 2 * half).to(dtype), torch.rand(half)
    cos, sin = rotary_table(501, inv_freq)[torch.tensor(positions)].unbind(1)
    turned = rotary(x, cos, sin)
    assert turned.dtype is torch.float32
    # Angles of hundreds of radians have errors of 1e-5 in float32, in every implementation of it.
    angles = torch.outer(torch.tensor(positions, dtype=torch.float32), inv_freq).double()
    numbers = torch.complex(x[..., :half].double(), x[..., half:].double())
    exact = numbers * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    torch.testing.assert_close(turned.double(), torch.cat((exact.real, exact.imag), -1), rtol=0, atol=1e-5)


@given(
    num_pages=st.integers(1, 6),
    heads=st.integers(1, 3),
    page_size=st.sampled_from([4, 16]),
    fresh=st.sets(st.integers(0, 5)),
    num_others=st.integers(0, 12),
    dtype=FLOATS,
    seed=SEEDS,
)
@settings(deadline=None)
def test_write_pages(
    num_pages: int, heads: int, page_size: int, fresh: set[int], num_others: int, dtype: torch.dtype, seed: int
) -> None:
    """A key in a neighbour's slot changes another request's answer; what a fresh page held before must not be read."""
    torch.manual_seed(seed)
    first_slots = [page * page_size for page in fresh if page < num_pages]
    others = [slot for slot in torch.randperm(num_pages * page_size).tolist() if slot % page_size][:num_others]
    slots = first_slots + others
    if not slots:
        return
    new = torch.randn(len(slots), heads, 8)
    pages = torch.full((num_pages, heads, page_size, 8), torch.inf, dtype=dtype)
    expected = pages.clone()
    for slot in first_slots:
        expected[slot // page_size] = 0
    for token, slot in enumerate(slots):
        expected[slot // page_size, :, slot % page_size] = new[token].to(dtype)
    write_pages(new, pages, plan_writes(torch.tensor(slots), heads, page_size))
    assert torch.equal(pages, expected)
