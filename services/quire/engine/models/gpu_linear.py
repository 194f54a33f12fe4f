"""Linear layers on a GPU: dense weights in the type that the model computes in, whatever the checkpoint holds.

Few rows in bfloat16 go through `quire.kernels.linear`, all else through cuBLAS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.engine.models.weights import LinearWeight, QuantizedWeight
from quire.kernels.linear import NormInput, SplitSpace, linear, normed_linear


@dataclass(frozen=True, slots=True)
class GpuLinear:
    """y = x Wᵀ, or x Wᵀ + b."""

    weight: Tensor  # [N, K]
    bias: Tensor | None = None  # [N], of the same type
    space: SplitSpace | None = None  # None: cuBLAS for any number of rows

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] of the weight's type → [T, N] of it."""
        return linear(x, self.weight, self.bias, self.space, dependent=True)

    def normed(self, x: Tensor, norm: NormInput, gated: bool = False) -> tuple[Tensor, Tensor]:
        """The product with `add_rms_norm` of x, and the residual stream with x in it. `gated`: silu(gate) · up of
        [gate | up] = x Wᵀ, [T, N / 2]; for layers without a bias."""
        return normed_linear(x, norm, self.weight, self.bias, self.space, gated, dependent=True)


@dataclass(frozen=True, slots=True)
class GpuLinears:
    """`quire.engine.models.linear.LinearFactory` for a GPU."""

    device: torch.device
    dtype: torch.dtype
    space: SplitSpace | None

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype) -> GpuLinears:
        """For weights of `dtype`."""
        skinny = device.type == "cuda" and dtype is torch.bfloat16
        return cls(device, dtype, SplitSpace.new(device) if skinny else None)

    def stacked(self, weights: Sequence[LinearWeight], bias: Tensor | None) -> GpuLinear:
        """One layer for all of `weights`, each copied to its rows straight from where the checkpoint has it."""
        bias = None if bias is None else bias.to(self.device, self.dtype)
        return GpuLinear(self.matrix(weights), bias, self.space)

    def matrix(self, weights: Sequence[LinearWeight]) -> Tensor:
        """[all rows, K]; packed weights travel packed and are unpacked on the GPU."""
        shapes = [_shape(weight) for weight in weights]
        matrix = torch.empty(sum(rows for rows, _ in shapes), shapes[0][1], dtype=self.dtype, device=self.device)
        start = 0
        for weight, (rows, _) in zip(weights, shapes, strict=True):
            matrix[start : start + rows].copy_(self._dense(weight))
            start += rows
        return matrix

    def vector(self, values: Tensor) -> Tensor:
        """`values` on the GPU, in float32: norms are computed in it."""
        return values.to(self.device)

    def _dense(self, weight: LinearWeight) -> Tensor:
        if not isinstance(weight, QuantizedWeight):
            return weight.to(self.device)
        minimums = None if weight.minimums is None else weight.minimums.to(self.device)
        codes, scales = weight.codes.to(self.device), weight.scales.to(self.device)
        return QuantizedWeight(codes, scales, minimums, weight.bits).dense()


def _shape(weight: LinearWeight) -> tuple[int, int]:
    shape = weight.codes.shape if isinstance(weight, QuantizedWeight) else weight.shape
    return (shape[0], shape[1])
