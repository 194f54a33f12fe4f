"""The gated activation of Llama's feed-forward layer (SwiGLU: Shazeer, "GLU Variants Improve Transformer", 2020)."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) · up for x = [gate | up], [T, 2 I] of any float type; the result has x's type, [T, I]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
