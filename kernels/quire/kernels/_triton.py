"""Triton where it is installed. PyTorch's builds for CPUs come without it, and there the torch references run.

Kernel files import `jit` and `tl` from here. Where Triton is missing a kernel is never launched, so its body may name
what does not exist.

Kernels of a step follow one another in a few microseconds, of which a launch is one. On Hopper GPUs a kernel may be
launched while the one before it still runs (programmatic dependent launch, CUDA programming guide §3.2.8.5). All that
do so keep to this: before `gdc_wait` a program reads nothing but weights, and each of its programs waits. So what a
kernel has waited for includes whatever ran before that. (Attention's two lists of work run side by side instead: see
`quire.kernels.paged_attention_triton`.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError:
    triton = tl = gdc_launch_dependents = gdc_wait = TensorDescriptor = None

__all__ = [
    "TensorDescriptor",
    "before_each_compilation",
    "ceil_div",
    "gdc_launch_dependents",
    "gdc_wait",
    "interpreted",
    "jit",
    "may_overlap",
    "next_power_of_2",
    "overlap_option",
    "register_option",
    "tl",
]


@cache
def may_overlap(device: torch.device) -> bool:
    """Whether this device can launch a kernel while the one before it still runs."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def overlap_option(overlaps: bool) -> dict[str, bool]:
    """What a launch is given besides, for the kernel to overlap with the one before it. Interpreters do not know it."""
    return {"launch_pdl": True} if overlaps else {}


def register_option(registers: int) -> dict[str, int]:
    """What a launch is given besides, for a thread to have at most so many registers; 0: as the compiler likes."""
    return {"maxnreg": registers} if registers and not interpreted() else {}


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`, typed as what it is to its callers: something that is indexed with a grid and called."""
    return kernel if triton is None else triton.jit(kernel)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which has to be asked for before Triton is imported."""
    return triton is not None and not isinstance(tl.sum, triton.runtime.jit.JITFunction)


def before_each_compilation(tell: Callable[[], None]) -> None:
    """Calls `tell`, in the thread that launches it, before this process compiles a kernel or finds it on the disk."""

    def hook(**_: object) -> bool:
        tell()
        # Whether not to compile it.
        return False

    if triton is not None:
        triton.knobs.runtime.jit_cache_hook = hook


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n, for n ≥ 1: what Triton wants a block to be."""
    return 1 << (n - 1).bit_length()
