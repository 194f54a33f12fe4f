"""Root-mean-square normalization, alone and fused with the residual addition in front of it.

Algorithm: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension.

    x float32 [T, H]; weight float32 [H]. Computed in float32; returned as `dtype` [T, H].
    """
    # The norm is one pass over x, where square().mean() is two and a copy.
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = length.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x * scale, weight, out=torch.empty_like(x, dtype=dtype))


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """residual += x, then `rms_norm` of it.

    residual float32 [T, H], changed in place; x of any float type [T, H].
    """
    return rms_norm(residual.add_(x), weight, eps, dtype)
