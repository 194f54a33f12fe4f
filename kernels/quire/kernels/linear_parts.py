"""What the kernels of `quire.kernels.linear` and `quire.kernels.linear_wide` share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels._triton import jit, tl


@dataclass(frozen=True, slots=True)
class SplitSpace:
    """Where the programs that share a tile meet. One serves all products of a stream, which run one after another."""

    partials: Tensor  # float32 [elements]
    arrivals: Tensor  # int32 [tiles], 0 between launches

    @classmethod
    def new(cls, device: torch.device, elements: int = 9 << 20, tiles: int = 1 << 14) -> SplitSpace:
        """Room for products of up to `elements` outputs times splits."""
        return cls(
            torch.empty(elements, dtype=torch.float32, device=device),
            torch.zeros(tiles, dtype=torch.int32, device=device),
        )


def check_operands(x: Tensor, weight: Tensor) -> None:
    """Raises ValueError where a kernel would read other elements than were meant."""
    size = x.shape[1]
    if weight.shape[1] != size or weight.dtype != x.dtype or not weight.is_contiguous() or x.stride(1) != 1:
        raise ValueError(
            f"weight must be contiguous, [N, {size}] and {x.dtype}, x contiguous along K: weight is "
            f"{list(weight.shape)} and {weight.dtype}, the strides are {weight.stride()} and {x.stride()}"
        )


def check_space(space: SplitSpace | None, elements: int, tiles: int, how: str) -> None:
    """Raises ValueError where the parts of a product cut `how` do not fit."""
    if space is None or space.partials.numel() < elements or space.arrivals.numel() < tiles:
        raise ValueError(f"a product {how} needs a SplitSpace of {elements} elements")


@jit
def prefetch(pointer: tl.tensor) -> None:
    """Asks for the line of each pointer in the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointer], dtype=tl.int32, is_pure=False, pack=1
    )
