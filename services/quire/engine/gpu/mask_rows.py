"""Grammars' masks on their way to a GPU, beside the forward pass, and on it to the logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quire.engine.gpu.graphs import Sizes
from quire.engine.gpu.host_memory import HostMemory
from quire.engine.gpu.staged_step import StagedStep
from quire.engine.runner import StepMasks
from quire.kernels.token_mask import apply_token_mask_triton


class MaskRows:
    """Room for a mask of each of `num_draws` rows of logits. Draws run on `stream`, None on a CPU, in graphs of
    `sizes`."""

    def __init__(
        self, num_draws: int, vocab_size: int, device: torch.device, stream: torch.cuda.Stream | None, sizes: Sizes
    ) -> None:
        num_words = -(-vocab_size // 32)
        self._masks = torch.zeros(num_draws, num_words, dtype=torch.int32, device=device)
        self._rows = torch.zeros(num_draws, dtype=torch.int32, device=device)
        self._sizes = sizes
        self._stream = stream
        self._copies = torch.cuda.Stream(device) if stream is not None else None  # type: ignore[no-untyped-call]
        self._sent = torch.zeros(num_draws, dtype=torch.int32, pin_memory=stream is not None)
        self._memory = HostMemory(num_draws, num_words) if stream is not None else None

    def send(self, staged: StagedStep, masks: StepMasks) -> int:
        """Copies a step's masks while its forward pass runs; returns how many rows `apply` is to be told.

        No step that still reads the last masks can be running: its tokens were needed to ask for these.
        """
        rows = staged.draws.rows_of(masks.work)
        size = self._sizes(len(rows)) or len(rows)
        sent = self._sent[:size]
        numbers = sent.numpy()
        numbers[: len(rows)], numbers[len(rows) :] = rows, -1
        # Blocks until the masks are there.
        bits = masks.batch.rows.view(np.int32)
        if self._memory is None or self._stream is None or self._copies is None:
            self._rows[:size].copy_(sent)
            self._masks[: len(rows)].copy_(torch.from_numpy(bits))
            return size
        with torch.cuda.stream(self._copies):
            self._rows[:size].copy_(sent, non_blocking=True)
            self._masks[: len(rows)].copy_(self._memory.readable(bits), non_blocking=True)
        self._stream.wait_stream(self._copies)
        return size

    def close(self) -> None:
        """Lets go of the sources' memory."""
        if self._memory is not None:
            self._memory.close()

    def apply(self, logits: Tensor, size: int) -> None:
        """Forbids what the masks that were sent forbid, in float32 [N, vocab_size]."""
        apply_token_mask_triton(logits, self._rows[:size], self._masks[:size])
