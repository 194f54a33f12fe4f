"""Grammars' masks on their way to a GPU, beside the forward pass, and on it to the logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quire.engine.gpu.graphs import Sizes
from quire.engine.gpu.staged_step import StagedStep
from quire.engine.runner import StepMasks
from quire.kernels.token_mask import apply_token_mask_triton


class MaskRows:
    """Room for a mask of each of `num_draws` rows of logits. Draws run on `stream`, None on a CPU, in graphs of
    `sizes`."""

    def __init__(
        self, num_draws: int, vocab_size: int, device: torch.device, stream: torch.cuda.Stream | None, sizes: Sizes
    ) -> None:
        self._masks = torch.zeros(num_draws, -(-vocab_size // 32), dtype=torch.int32, device=device)
        self._rows = torch.zeros(num_draws, dtype=torch.int32, device=device)
        self._sizes = sizes
        self._stream = stream
        self._copies = torch.cuda.Stream(device) if stream is not None else None  # type: ignore[no-untyped-call]

    def send(self, staged: StagedStep, masks: StepMasks) -> int:
        """Copies a step's masks while its forward pass runs; returns how many rows `apply` is to be told."""
        rows = staged.draws.rows_of(masks.work).astype(np.int32)
        size = self._sizes(len(rows)) or len(rows)
        padded = np.full(size, -1, dtype=np.int32)
        padded[: len(rows)] = rows
        # Blocks until the masks are there.
        bits = torch.from_numpy(masks.batch.rows.view(np.int32))
        if self._copies is None or self._stream is None:
            self._masks[: len(rows)].copy_(bits)
            self._rows[:size].copy_(torch.from_numpy(padded))
            return size
        # No step that still reads the last masks can be running: its tokens were needed to ask for these.
        with torch.cuda.stream(self._copies):
            self._masks[: len(rows)].copy_(_pinned(bits), non_blocking=True)
            self._rows[:size].copy_(torch.from_numpy(padded).pin_memory(), non_blocking=True)
        self._stream.wait_stream(self._copies)
        return size

    def apply(self, logits: Tensor, size: int) -> None:
        """Forbids what the masks that were sent forbid, in float32 [N, vocab_size]."""
        apply_token_mask_triton(logits, self._rows[:size], self._masks[:size])


def _pinned(values: Tensor) -> Tensor:
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)
