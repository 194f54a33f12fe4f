"""What a model asks of a checkpoint: tensors by their Hugging Face names, whatever the file calls them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quire.engine.models.settings import Settings
from quire.service.errors import ModelError

GROUP_SIZE = 32  # columns that share a scale, in all of llama.cpp's simple types


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A matrix [N, K] of integers, scaled in groups of GROUP_SIZE columns: weight = code · scale + minimum."""

    codes: Tensor  # [N, K]: uint8, 0 to 15, if bits is 4; int8 if bits is 8
    scales: Tensor  # float32 [N, K / GROUP_SIZE]
    minimums: Tensor | None  # the same; None is 0
    bits: int

    def dense(self) -> Tensor:
        """The matrix in float32, bit for bit as the `gguf` package dequantizes it."""
        rows = self.codes.shape[0]
        weight = self.codes.view(rows, -1, GROUP_SIZE) * self.scales.unsqueeze(-1)
        if self.minimums is not None:
            weight.add_(self.minimums.unsqueeze(-1))
        return weight.view(rows, -1)


LinearWeight = Tensor | QuantizedWeight


class Tensors(Protocol):
    """Tensors by name. Every method raises ModelError that names tensor and file if a tensor is not as expected."""

    def vector(self, name: str, size: int) -> Tensor:
        """Float32 [size]."""

    def matrix(self, name: str, rows: int, columns: int) -> LinearWeight:
        """[rows, columns], in the type it is stored in."""


class Weights(Tensors, Protocol):
    """An open checkpoint of a model."""

    settings: Settings

    def part(self, name: str, shape: tuple[int, int], rows: range, columns: range) -> LinearWeight:
        """Of the matrix `name`, which has `shape`, these rows and columns; of a tensor with rows by head, whole heads.

        Nothing else is read, but the rest of packed blocks that are cut.
        """

    def frequency_divisors(self, size: int) -> Tensor | None:
        """Float32 [size], by which rotary frequencies are to be divided; None if the settings say it all."""

    def finish(self) -> None:
        """Raises ModelError if the checkpoint holds tensors that nobody asked for: it is another model then."""


class Checklist:
    """Which of a checkpoint's tensors were asked for, and whether they are as expected."""

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        self._path = path
        self._shapes = shapes
        self._left = set(shapes)

    def take(self, name: str, shape: tuple[int, ...]) -> None:
        """Books `name`, in the file's own spelling; raises ModelError if it is missing or has another shape."""
        found = self._shapes.get(name)
        if found is None:
            raise ModelError(f"{self._path} lacks the tensor {name}: the model's export is incomplete", field="model")
        if found != shape:
            raise ModelError(
                f"the tensor {name} of {self._path} has the shape {list(found)} where the model's configuration "
                f"makes it {list(shape)}: weights and configuration are of different models",
                field="model",
            )
        self._left.discard(name)

    def finish(self) -> None:
        """Raises ModelError if tensors are left that nobody asked for."""
        if self._left:
            names = sorted(self._left)
            raise ModelError(
                f"{self._path} holds tensors that its architecture does not have, {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}: the model is of a kind that is not "
                "supported",
                field="model",
            )


def stack(parts: Sequence[LinearWeight]) -> LinearWeight:
    """One matrix of the parts' rows, so that one product does for all; quantized if all of them are alike."""
    quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
    first = quantized[0] if quantized else None
    if first is None or len(quantized) < len(parts) or any(part.bits != first.bits for part in quantized):
        return torch.cat([dense(part) for part in parts])
    return QuantizedWeight(
        torch.cat([part.codes for part in quantized]),
        torch.cat([part.scales for part in quantized]),
        # A type without minimums beside one with them has zeros.
        None
        if all(part.minimums is None for part in quantized)
        else torch.cat([torch.zeros_like(p.scales) if p.minimums is None else p.minimums for p in quantized]),
        first.bits,
    )


def dense(weight: LinearWeight) -> Tensor:
    """The matrix as a float tensor."""
    return weight.dense() if isinstance(weight, QuantizedWeight) else weight
