"""The Triton kernel of the gated activation against float64, interpreted on a CPU and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import triton_testing
from triton_testing import DEVICE, FLOAT_TYPES, assert_close

triton_testing.need_triton()

from quire.kernels.silu_and_mul import silu_and_mul_triton  # noqa: E402


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 64), (2, 1000), (4, 1024), (2, 2500), (0, 64)])
def test_activation_equals_its_definition(rows: int, size: int, dtype: torch.dtype) -> None:
    """Without it every feed-forward layer on a GPU may be off."""
    x = torch.randn(rows, 2 * size, device=DEVICE, dtype=dtype) * 4
    out = silu_and_mul_triton(x)
    if rows:
        gate, up = x.chunk(2, dim=-1)
        exact = F.silu(gate.double()) * up.double()
        assert_close(out, exact, (F.silu(gate.float()) * up.float()).to(dtype))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # the interpreter's numpy
def test_large_gates_neither_overflow_nor_vanish() -> None:
    """Without it an outlier among the activations becomes NaN: exp(-gate) overflows for a gate below -88."""
    gate = torch.tensor([[-1e4, -100.0, -88.8, 0.0, 88.8, 100.0, 1e4, 0.0]], device=DEVICE)
    out = silu_and_mul_triton(torch.cat((gate, torch.ones_like(gate)), -1))
    assert torch.allclose(out, gate.clamp_min(0), atol=1e-30)


def test_a_layout_that_the_kernel_cannot_read_is_refused() -> None:
    """Without it a slice of a product's output gives wrong numbers and no error."""
    with pytest.raises(ValueError, match="contiguous"):
        silu_and_mul_triton(torch.randn(4, 64, device=DEVICE)[:, :32])
