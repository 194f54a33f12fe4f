"""What the tests of Triton kernels share: where they run, and how exact they must be.

With a GPU they run compiled, without one in Triton's interpreter, which works on bit patterns where a type is bfloat16
and so is not asked about it. Compiling takes most of their time on a GPU, and one core each; all of them, side by side
(`-o addopts=` does without the plugins of the other tests):

    ls tests/kernels/*.py | xargs -P 8 -n 1 python -m pytest -v --durations=3 -o addopts=--import-mode=importlib
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
FLOAT_TYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def need_triton() -> None:
    """Skips the calling module where Triton is not installed."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if DEVICE == "cpu" and isinstance(triton.language.sum, triton.runtime.jit.JITFunction):
        pytest.fail("Triton was imported before these tests could ask for its interpreter: set TRITON_INTERPRET=1")


def examples(interpreted: int, compiled: int) -> int:
    """How many examples a property test looks at: the interpreter takes a millisecond for every operation."""
    return interpreted if DEVICE == "cpu" else compiled


def compiled_for(*choices: Sequence[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    """What a kernel is compiled for, one of each of `choices`, of which none has more than six.

    Interpreted it is any combination of them. Compiled each takes seconds: six, in which each value occurs.
    """
    if DEVICE == "cpu":
        return st.tuples(*map(st.sampled_from, choices))
    # From one round through a choice's values to the next its place shifts them, so that others meet.
    six = [
        tuple(values[(n + n // len(values) * place) % len(values)] for place, values in enumerate(choices))
        for n in range(6)
    ]
    return st.sampled_from(six)


def assert_close(out: Tensor, exact: Tensor, torch_out: Tensor, slack: float = 1e-6) -> None:
    """out must be within twice the error that torch makes in the same precision (FlashAttention's rule).

    `exact` is computed in float64 and `torch_out` by torch in out's type from the same inputs. `slack` is relative to
    the largest exact value: where torch happens to make no error at all, a kernel may still round.
    """
    assert out.shape == exact.shape and out.dtype == torch_out.dtype
    error = (out.double() - exact).abs().max().item()
    allowed = (torch_out.double() - exact).abs().max().item()
    limit = 2 * allowed + slack * exact.abs().max().item()
    assert error <= limit, f"error {error:.3g}, where torch's is {allowed:.3g}"


def poison(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor full of NaN, or of a conspicuous integer: what a kernel leaves unwritten shows."""
    value = float("nan") if dtype.is_floating_point else -77
    return torch.full(shape, value, dtype=dtype, device=DEVICE)
