"""Random weights for a model of which there is only config.json: speed does not depend on their values.

What `load_format="dummy"` means, vLLM's name for it. Weights are drawn where they are used: a processor takes minutes
for what a GPU draws in a second.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quire.engine.models.safetensors import read_settings

# Small enough that a deep stack of layers stays finite in bfloat16, large enough that logits differ.
_DEVIATION = 0.02


class DummyWeights:
    """`quire.engine.models.weights.Weights` for a folder with config.json; its tensors lie on `device`."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.settings = read_settings(path)
        self._device = device
        self._dtype = dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def vector(self, name: str, size: int) -> Tensor:
        """Float32 [size]: ones for a norm, nothing for a bias."""
        fill = torch.zeros if name.endswith(".bias") else torch.ones
        return fill(size, dtype=torch.float32, device=self._device)

    def matrix(self, name: str, rows: int, columns: int) -> Tensor:
        """[rows, columns], normally distributed around 0."""
        matrix = torch.empty(rows, columns, dtype=self._dtype, device=self._device)
        return matrix.normal_(0.0, _DEVIATION, generator=self._generator)

    def part(self, name: str, shape: tuple[int, int], rows: range, columns: range) -> Tensor:
        """As many rows and columns, drawn anew."""
        return self.matrix(name, len(rows), len(columns))

    def frequency_divisors(self, size: int) -> None:
        """There are none: the settings say it all."""

    def finish(self) -> None:
        """Nothing can be left over."""
