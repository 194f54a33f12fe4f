"""What lies between a layer's products, over rows of tokens: what a GPU should read and write once."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from quire.kernels.rotary import rotary
from quire.speculate.compiled import Compiled


def no_planned_attention() -> AbstractContextManager[None]:
    """Within it `scaled_dot_product_attention` takes none of cuDNN's kernels, torch's first choice on a Hopper GPU:
    they are planned anew for each batch size and length, which takes tens of milliseconds."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x of any float type [T, hidden_size], weight float32 [hidden_size] → `dtype`; computed in float32."""
    given = x.to(torch.float32)
    return (given * torch.rsqrt(given.square().mean(-1, keepdim=True) + eps) * weight).to(dtype)


normed = Compiled(rms_norm)


@Compiled
def both_normed(
    first: Tensor, second: Tensor, first_weight: Tensor, second_weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Two of [T, hidden_size], each normalized, beside each other: [T, 2 × hidden_size]."""
    return torch.cat((rms_norm(first, first_weight, eps, dtype), rms_norm(second, second_weight, eps, dtype)), -1)


@Compiled
def added_and_normed(
    residual: Tensor, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """residual + x, both [T, hidden_size], and `rms_norm` of it."""
    total = residual + x
    return total, rms_norm(total, weight, eps, dtype)


@Compiled
def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of [gate | up], [T, 2 I] → [T, I]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@Compiled
def turned_heads(
    qkv: Tensor, positions: Tensor, rotations: Tensor, num_heads: int, head_norm: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, num_heads, head_size], keys and values [T, kv_heads, head_size] of qkv [T, all × head_size].

    positions int64 [T] are rows of `rotations`, float32 [N, 2, head_size]. `head_norm` float32 [heads + kv_heads,
    head_size]: queries and keys are normalized per head before they are turned.
    """
    heads = qkv.view(qkv.shape[0], -1, rotations.shape[-1])
    num_rotated = num_heads + (heads.shape[1] - num_heads) // 2
    given = heads[:, :num_rotated]
    if head_norm is not None:
        given = rms_norm(given, head_norm, eps, torch.float32)
    # Padding may lie past the last position.
    cos, sin = rotations[positions.clamp_max(rotations.shape[0] - 1)].unsqueeze(2).unbind(1)
    turned = rotary(given, cos, sin).to(qkv.dtype)
    # None is a view, so that the gradients are written once, together.
    return turned[:, :num_heads].clone(), turned[:, num_heads:].clone(), heads[:, num_rotated:].clone()
