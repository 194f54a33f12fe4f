"""What stands in a GGUF tensor's bytes. Quantized types are for the `gguf` package, but for those that are kept packed:
their codes and scales are taken apart here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from quire.engine.models.weights import GROUP_SIZE, LinearWeight, QuantizedWeight


def decode(rows: Tensor, kind: GGMLQuantizationType) -> LinearWeight:
    """The matrix whose rows' bytes are `rows`, uint8 [N, bytes of a row].

    Raises NotImplementedError for a type that `gguf` can't dequantize.
    """
    if kind in _FLOATS:
        return rows.view(_FLOATS[kind])
    if kind in _PACKED:
        _, block_bytes = GGML_QUANT_SIZES[kind]
        return _PACKED[kind](rows.view(rows.shape[0], -1, block_bytes))
    return torch.from_numpy(dequantize(rows.numpy(), kind))


def _q4_0(blocks: Tensor) -> QuantizedWeight:
    scales = _half(blocks, 0)
    return QuantizedWeight(_nibbles(blocks[..., 2:]), scales, -8 * scales, 4)


def _q4_1(blocks: Tensor) -> QuantizedWeight:
    return QuantizedWeight(_nibbles(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2), 4)


def _q8_0(blocks: Tensor) -> QuantizedWeight:
    codes = blocks[..., 2:].contiguous().view(torch.int8).view(blocks.shape[0], -1)
    return QuantizedWeight(codes, _half(blocks, 0), None, 8)


def _nibbles(packed: Tensor) -> Tensor:
    """[N, blocks, 16] bytes to [N, K] codes: a block's low nibbles are its first half."""
    codes = torch.empty(*packed.shape[:-1], 2, GROUP_SIZE // 2, dtype=torch.uint8)
    torch.bitwise_and(packed, 15, out=codes[..., 0, :])
    torch.bitwise_right_shift(packed, 4, out=codes[..., 1, :])
    return codes.view(packed.shape[0], -1)


def _half(blocks: Tensor, offset: int) -> Tensor:
    """The float16 at a place in every block, as float32 [N, blocks]."""
    return blocks[..., offset : offset + 2].contiguous().view(torch.float16).squeeze(-1).to(torch.float32)


_FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_PACKED: dict[GGMLQuantizationType, Callable[[Tensor], QuantizedWeight]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q8_0: _q8_0,
}
