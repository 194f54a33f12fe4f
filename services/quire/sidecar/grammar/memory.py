"""How much memory this process has, as Linux counts it."""

from __future__ import annotations

import resource
from pathlib import Path

_STATM = Path("/proc/self/statm")


def virtual_bytes() -> int:
    """Addresses in use; 0 where the kernel has no /proc."""
    return _pages(0) * resource.getpagesize()


def resident_bytes() -> int:
    """Memory in use; 0 where the kernel has no /proc."""
    return _pages(1) * resource.getpagesize()


def _pages(column: int) -> int:
    return int(_STATM.read_text().split()[column]) if _STATM.exists() else 0
