"""Linear layers on a CPU: which of torch's products serves a weight best, by the number of rows in a step.

- A few rows are bound by reading the weights: 4-bit ones are read fastest (`_weight_int4pack_mm_for_cpu`).
- More rows are bound by arithmetic: a dense copy through oneDNN, in bfloat16 where the CPU multiplies it natively, else
  in float32. That copy is the only one beside the packed weights.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quire.engine.models.model import ModelDtype
from quire.engine.models.weights import GROUP_SIZE, LinearWeight, QuantizedWeight, dense, stack

# A 4-bit product of at most this many rows beats a dense one, and a bfloat16 one without native support a float32 one.
_PACKED_ROWS_BESIDE_BFLOAT16 = 4
_PACKED_ROWS_BESIDE_FLOAT32 = 8
_EMULATED_ROWS = 3


class Linear(Protocol):
    """y = x Wᵀ, or x Wᵀ + b."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] → [T, N], in a float type of the product's choice. Best if x has `LinearKernels.input_dtype(T)`."""


class LinearFactory(Protocol):
    """Puts a checkpoint's tensors where a device computes with them."""

    def stacked(self, weights: Sequence[LinearWeight], bias: Tensor | None) -> Linear:
        """One layer for weights [N, K] whose rows follow one another, and a bias, float32, over all of them."""

    def vector(self, values: Tensor) -> Tensor:
        """`values`, on the device."""


@dataclass(frozen=True, slots=True)
class LinearKernels:
    """Which products this CPU is to use. Chosen by its instructions, not by timing: a restart computes the same."""

    large: torch.dtype  # of dense weights, and of their activations
    small: torch.dtype  # of the activations in a step of at most `small_rows` rows
    small_rows: int
    prepacked: bool  # dense weights in oneDNN's own layout

    @classmethod
    def choose(cls, dtype: ModelDtype, num_parameters: int, available: int | None) -> LinearKernels:
        """The best kernels of this machine for a mode, with no dense copy of packed weights if memory is short of it.

        `available` is the memory that may be used, in bytes; None is enough.
        """
        prepacked = bool(torch._C._has_mkldnn)
        if dtype is ModelDtype.FLOAT32:
            return cls(torch.float32, torch.float32, 0, prepacked)
        large, small_rows = torch.float32, _PACKED_ROWS_BESIDE_FLOAT32
        if has_native_bfloat16():
            large, small_rows = torch.bfloat16, _PACKED_ROWS_BESIDE_BFLOAT16
        if available is not None and num_parameters * large.itemsize > available // 2:
            small_rows = sys.maxsize
        return cls(large, torch.bfloat16, small_rows, prepacked)

    def input_dtype(self, rows: int) -> torch.dtype:
        """What a linear layer wants its input to be in a step of `rows` rows."""
        return self.small if rows <= self.small_rows else self.large

    def linear(self, weight: LinearWeight, bias: Tensor | None = None) -> Linear:
        """The layer for a weight [N, K] and a bias, float32 [N]."""
        product = self._product(weight)
        return product if bias is None else BiasedLinear(product, bias)

    def stacked(self, weights: Sequence[LinearWeight], bias: Tensor | None) -> Linear:
        """The layer for all of `weights` in one product."""
        return self.linear(stack(weights), bias)

    def vector(self, values: Tensor) -> Tensor:
        """They are where they belong."""
        return values

    def _product(self, weight: LinearWeight) -> Linear:
        if self.small_rows and isinstance(weight, QuantizedWeight) and PackedLinear.takes(weight):
            packed = PackedLinear(weight)
            if self.small_rows == sys.maxsize:
                return packed
            return SteppedLinear(packed, self._dense(dense(weight)), self.small_rows)
        plain = dense(weight)
        if self.small_rows and self.large is torch.float32 and plain.dtype is torch.bfloat16:
            return SteppedLinear(PlainLinear(plain), self._dense(plain), _EMULATED_ROWS)
        return self._dense(plain)

    def _dense(self, weight: Tensor) -> Linear:
        weight = weight.to(self.large)
        return PrepackedLinear(weight) if self.prepacked else PlainLinear(weight)


def has_native_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 with instructions made for it."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    # torch may have been told to stay below what the CPU can do (ATEN_CPU_CAPABILITY).
    return bool(native) and torch.backends.cpu.get_cpu_capability() == "AVX512"


class PlainLinear:
    """A dense weight as it is."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self._weight.dtype), self._weight)


class PrepackedLinear:
    """A dense weight in the layout that oneDNN multiplies from: at few rows, arranging it is most of the work."""

    def __init__(self, weight: Tensor) -> None:
        self._dtype = weight.dtype
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self._product(x.to(self._dtype), self._weight, None, "none", [], "")
        return result


class PackedLinear:
    """A quantized weight, two codes a byte, times bfloat16 activations.

    torch's kernel computes (code - 8) · scale + zero, so zero is minimum + 8 · scale. An 8-bit code is 16 · high + low:
    two 4-bit planes side by side in K, which meet two copies of x.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        codes, scales = weight.codes, weight.scales
        self._planes = 1
        # bfloat16 first: both planes of an 8-bit code must have the same rounded scale, or they do not fit together.
        scales = scales.to(torch.bfloat16).to(torch.float32)
        zeros = 8 * scales if weight.minimums is None else weight.minimums + 8 * scales
        if weight.bits == 8:
            self._planes = 2
            codes = torch.cat(((codes >> 4) + 8, codes & 15), 1)
            zeros = torch.cat((zeros - 8 * scales, 8 * scales), 1)
            scales = torch.cat((16 * scales, scales), 1)
        self._weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
        self._scales = torch.stack((scales.t(), zeros.t()), -1).to(torch.bfloat16).contiguous()
        # The function, not the operator of the same name: it costs a microsecond less, 121 times a token.
        self._product = torch._weight_int4pack_mm_for_cpu

    @staticmethod
    def takes(weight: QuantizedWeight) -> bool:
        """Whether the kernel can: it works on 16 rows at a time."""
        return weight.codes.shape[0] % 16 == 0

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.bfloat16:
            x = x.to(torch.bfloat16)
        if self._planes == 2:
            x = torch.cat((x, x), 1)
        result: Tensor = self._product(x, self._weight, GROUP_SIZE, self._scales)
        return result


class SteppedLinear:
    """One product for steps of few rows, another for the rest."""

    def __init__(self, small: Linear, large: Linear, small_rows: int) -> None:
        self._small = small
        self._large = large
        self._small_rows = small_rows

    def __call__(self, x: Tensor) -> Tensor:
        return self._small(x) if x.shape[0] <= self._small_rows else self._large(x)


class BiasedLinear:
    """A product, and a vector added to it in float32: a bias may be a hundred times what it is added to."""

    def __init__(self, product: Linear, bias: Tensor) -> None:
        self._product = product
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x) + self._bias
