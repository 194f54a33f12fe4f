"""Grammar masks applied to logits: what the sidecar forbids becomes -inf.

Masks are bit fields as the contract defines them (protos/quire/v1/grammar.proto): token t is allowed if bit t mod 32 of
word t div 32 is set.
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_token_mask(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Masks some rows of `logits` in place.

    logits float32 [N, V]; rows int64 [M], which rows; masks int32 [M, ceil(V / 32)].
    """
    shifts = torch.arange(32, dtype=torch.int32, device=masks.device)
    bits = (masks.unsqueeze(-1) >> shifts) & 1
    forbidden = bits.reshape(masks.shape[0], -1)[:, : logits.shape[1]] == 0
    logits[rows] = logits[rows].masked_fill_(forbidden, -torch.inf)
