"""Triton where it is installed. PyTorch's builds for CPUs come without it, and there the torch references run.

Kernel files import `jit` and `tl` from here. Where Triton is missing a kernel is never launched, so its body may name
what does not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError:
    triton = tl = gdc_launch_dependents = gdc_wait = TensorDescriptor = None

__all__ = ["TensorDescriptor", "ceil_div", "gdc_launch_dependents", "gdc_wait", "jit", "next_power_of_2", "tl"]


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`, typed as what it is to its callers: something that is indexed with a grid and called."""
    return kernel if triton is None else triton.jit(kernel)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n, for n ≥ 1: what Triton wants a block to be."""
    return 1 << (n - 1).bit_length()
