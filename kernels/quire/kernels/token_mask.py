"""Grammar masks applied to logits: what the sidecar forbids becomes -inf.

Masks are bit fields as the contract defines them (protos/quire/v1/grammar.proto): token t is allowed if bit t mod 32 of
word t div 32 is set.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
from torch import Tensor

from quire.kernels._triton import ceil_div, jit, tl

_BLOCK_WORDS = 128


def apply_token_mask(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Masks some rows of `logits` in place.

    logits float32 [N, V]; rows int64 [M], which rows; masks int32 [M, ceil(V / 32)].
    """
    if logits.is_cuda:
        apply_token_mask_triton(logits, rows, masks)
        return
    shifts = torch.arange(32, dtype=torch.int32, device=masks.device)
    bits = (masks.unsqueeze(-1) >> shifts) & 1
    forbidden = bits.reshape(masks.shape[0], -1)[:, : logits.shape[1]] == 0
    logits[rows] = logits[rows].masked_fill_(forbidden, -torch.inf)


@jit
def _token_mask_kernel(
    logits_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    masks_ptr: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    num_words: tl.tensor,
    BLOCK_WORDS: tl.constexpr,
) -> None:
    """A block of one mask's words a program. Logits are written where they are forbidden and never read."""
    row = tl.load(rows_ptr + tl.program_id(0)).to(tl.int64)
    if row < 0:
        return
    word = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    words = tl.load(masks_ptr + tl.program_id(0).to(tl.int64) * num_words + word, mask=word < num_words, other=-1)
    bit = tl.arange(0, 32)
    token = word[:, None] * 32 + bit[None, :]
    forbidden = (((words[:, None] >> bit[None, :]) & 1) == 0) & (token < vocab_size)
    nothing = tl.full((BLOCK_WORDS, 32), float("-inf"), logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + row * logits_stride + token, nothing, mask=forbidden)


def apply_token_mask_triton(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """`apply_token_mask` for logits of any float type; a negative entry of `rows` (int32 or int64) masks nothing.

    So a captured graph can serve any number of masks up to M.
    """
    if logits.stride(1) != 1 or not masks.is_contiguous():
        raise ValueError(
            f"logits must be contiguous along the vocabulary, and their strides are {logits.stride()}; "
            f"masks must be contiguous, and their strides are {masks.stride()}"
        )
    num_masks, num_words = masks.shape
    vocab_size = logits.shape[1]
    if num_words != ceil_div(vocab_size, 32):
        raise ValueError(f"masks must have {ceil_div(vocab_size, 32)} words for {vocab_size} tokens, not {num_words}")
    _token_mask_kernel[(num_masks, ceil_div(num_words, _BLOCK_WORDS))](
        logits, rows, masks, logits.stride(0), vocab_size, num_words, BLOCK_WORDS=_BLOCK_WORDS, num_warps=4
    )
