"""The Triton kernel between QKV product and attention against float64, interpreted on a CPU and compiled on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import triton_testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_testing import DEVICE, FLOAT_TYPES, assert_close, poison

triton_testing.need_triton()

from quire.kernels.rotary import rotary_table  # noqa: E402
from quire.kernels.rotary_and_write import HeadNorm, rotary_and_write, rotary_and_write_triton  # noqa: E402

NUM_PAGES, PAGE_SIZE, NUM_POSITIONS, EPS = 6, 16, 200, 1e-6


@dataclass(frozen=True, slots=True)
class Inputs:
    qkv: Tensor
    positions: Tensor
    table: Tensor
    slots: Tensor
    norm: HeadNorm | None


def make_inputs(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, with_norm: bool, seed: int
) -> Inputs:
    torch.manual_seed(seed)
    inv_freq = 1.0 / 10000 ** (torch.arange(0, head_size, 2).float() / head_size)
    weights = torch.randn(2, head_size)
    return Inputs(
        qkv=torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_size).to(dtype).to(DEVICE),
        positions=torch.randint(0, NUM_POSITIONS, (num_tokens,)).to(DEVICE),
        table=rotary_table(NUM_POSITIONS, inv_freq).to(DEVICE),
        slots=torch.randperm(NUM_PAGES * PAGE_SIZE)[:num_tokens].to(DEVICE),
        norm=HeadNorm(weights[0].to(DEVICE), weights[1].to(DEVICE), EPS) if with_norm else None,
    )


def split_heads(inputs: Inputs, num_kv_heads: int, precision: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as they should be, by the definition: pairs are complex numbers."""
    x = inputs.qkv.to(precision)
    num_heads = x.shape[1] - 2 * num_kv_heads
    parts = [x[:, :num_heads], x[:, num_heads : num_heads + num_kv_heads]]
    half = x.shape[2] // 2
    turn = inputs.table.to(precision)[inputs.positions]
    angle = torch.complex(turn[:, 0, :, :half], turn[:, 1, :, half:])
    turned = []
    for part, name in zip(parts, ("query_weight", "key_weight"), strict=True):
        if inputs.norm is not None:
            weight = getattr(inputs.norm, name).to(precision)
            part = part * torch.rsqrt(part.square().mean(-1, keepdim=True) + EPS) * weight
        pairs = torch.complex(part[..., :half].contiguous(), part[..., half:].contiguous()) * angle
        turned.append(torch.cat((pairs.real, pairs.imag), -1))
    return turned[0], turned[1], x[:, num_heads + num_kv_heads :]


def at_slots(pages: Tensor, slots: Tensor) -> Tensor:
    return pages[slots // PAGE_SIZE, :, slots % PAGE_SIZE]


@settings(max_examples=30, deadline=None)
@given(
    num_tokens=st.sampled_from([1, 2, 7, 33, 40]),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3), (8, 1), (16, 8)]),
    head_size=st.sampled_from([2, 64, 80, 96, 128]),
    dtype=st.sampled_from(FLOAT_TYPES),
    pool_dtype=st.sampled_from(FLOAT_TYPES),
    with_norm=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_heads_are_turned_and_written_to_their_slots(
    num_tokens: int,
    heads: tuple[int, int],
    head_size: int,
    dtype: torch.dtype,
    pool_dtype: torch.dtype,
    with_norm: bool,
    seed: int,
) -> None:
    """Without it attention on a GPU may see keys of wrong positions, or another token's values."""
    num_heads, num_kv_heads = heads
    inputs = make_inputs(num_tokens, num_heads, num_kv_heads, head_size, dtype, with_norm, seed)
    keys, values = (poison(NUM_PAGES, num_kv_heads, PAGE_SIZE, head_size, dtype=pool_dtype) for _ in range(2))
    queries = rotary_and_write_triton(
        inputs.qkv, inputs.positions, inputs.table, inputs.slots, keys, values, inputs.norm
    )
    exact = split_heads(inputs, num_kv_heads, torch.float64)
    by_torch = split_heads(inputs, num_kv_heads, torch.float32)
    outs = (queries, at_slots(keys, inputs.slots), at_slots(values, inputs.slots))
    for out, expected, torch_out in zip(outs, exact, by_torch, strict=True):
        assert_close(out, expected, torch_out.to(pool_dtype))
    # What was poison elsewhere still is.
    unused = torch.ones(NUM_PAGES * PAGE_SIZE, dtype=torch.bool, device=DEVICE)
    unused[inputs.slots] = False
    others = torch.nonzero(unused).squeeze(-1)
    assert at_slots(keys, others).isnan().all() and at_slots(values, others).isnan().all()


def test_reference_and_kernel_agree() -> None:
    """Without it the torch reference of the whole, which no engine calls, may drift from the kernel."""
    inputs = make_inputs(5, 4, 2, 64, torch.float32, True, 0)
    pages = [torch.zeros(NUM_PAGES, 2, PAGE_SIZE, 64, device=DEVICE) for _ in range(4)]
    args = (inputs.qkv, inputs.positions, inputs.table, inputs.slots)
    out = rotary_and_write_triton(*args, pages[0], pages[1], inputs.norm)
    norm = inputs.norm
    assert norm is not None
    expected = rotary_and_write(
        *(x.cpu() for x in args),
        *(cpu_pages := [torch.zeros(NUM_PAGES, 2, PAGE_SIZE, 64) for _ in range(2)]),
        HeadNorm(norm.query_weight.cpu(), norm.key_weight.cpu(), norm.eps),
    )
    torch.testing.assert_close(out.cpu(), expected)
    torch.testing.assert_close(pages[0].cpu(), cpu_pages[0])
    torch.testing.assert_close(pages[1].cpu(), cpu_pages[1])


def test_a_token_without_a_slot_is_not_written() -> None:
    """Without it the tokens that fill up a captured graph's batch overwrite some request's page."""
    inputs = make_inputs(3, 4, 2, 64, torch.float32, False, 0)
    inputs.slots[1] = -1
    keys, values = (poison(NUM_PAGES, 2, PAGE_SIZE, 64, dtype=torch.float32) for _ in range(2))
    rotary_and_write_triton(inputs.qkv, inputs.positions, inputs.table, inputs.slots, keys, values)
    assert (~keys.isnan()).sum() == (~values.isnan()).sum() == 2 * 2 * 64
    assert not at_slots(keys, inputs.slots[[0, 2]]).isnan().any()


def test_layouts_that_the_kernel_cannot_read_are_refused() -> None:
    """Without it a transposed input gives wrong numbers and no error."""
    inputs = make_inputs(3, 4, 2, 64, torch.float32, False, 0)
    pages = torch.zeros(NUM_PAGES, 2, PAGE_SIZE, 64, device=DEVICE)
    with pytest.raises(ValueError, match="a token's heads in qkv must be contiguous"):
        rotary_and_write_triton(inputs.qkv.transpose(1, 2), inputs.positions, inputs.table, inputs.slots, pages, pages)
    with pytest.raises(ValueError, match=r"table must be \[positions, 2, 1, 64\]"):
        rotary_and_write_triton(
            inputs.qkv, inputs.positions, inputs.table[..., :32].contiguous(), inputs.slots, pages, pages
        )
