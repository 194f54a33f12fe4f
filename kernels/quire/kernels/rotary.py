"""Rotary position embedding of queries and keys, in the half-split order of Hugging Face's Llama.

Element i of a head's first half and element i of its second half are one pair, turned by position · inv_freq[i].
Algorithm: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(num_positions: int, inv_freq: Tensor) -> Tensor:
    """Cosines and sines of positions 0 to num_positions - 1: float32 [num_positions, 2, 1, D].

    inv_freq float32 [D / 2]. The sines of the first half are negative, so that `rotary` needs no negation.
    """
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inv_freq)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1).unsqueeze(2)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """x turned by its positions, computed in float32: a new float32 [T, heads, D], or `out`, which may be x.

    x of any float type [T, heads, D]; cos, sin float32 [T, 1, D], rows of `rotary_table`.
    """
    # Three types in one operation cost more than the copies that spare them.
    given = x.type(torch.float32)
    turned = given.mul(cos).addcmul_(given.roll(given.shape[-1] // 2, -1), sin)
    return turned if out is None else out.copy_(turned)
