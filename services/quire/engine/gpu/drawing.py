"""Draws the tokens of a step's rows on the device that holds their logits; the result equals `quire.engine.sampler`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quire.engine.gpu.batch import GpuBatch
from quire.engine.sampler import SamplingRows, sample
from quire.kernels.sample import sample_triton


def draw_tokens(logits: Tensor, batch: GpuBatch, tokens: Tensor) -> None:
    """Writes the token drawn for each row of float32 [N, V] into `tokens`, int [N], and behind its slot's others.

    Which slots is in the first N of `batch.columns`. A row whose logits hold a NaN or nothing but -inf gets -1.
    """
    slots, positions = batch.columns.drawing_slots[: len(logits)], batch.columns.positions[: len(logits)]
    if logits.is_cuda:
        sample_triton(logits, slots, positions, batch.parameters, batch.token_ids, tokens)
        return
    rows, parameters = slots.to(torch.int64), batch.parameters
    drawn = sample(
        logits,
        SamplingRows(
            temperature=parameters.temperature[rows],
            top_p=parameters.top_p[rows],
            top_k=parameters.top_k[rows].to(torch.int64),
            min_p=parameters.min_p[rows],
            seed=parameters.seed[rows].numpy().view(np.uint64),
            position=positions.numpy().astype(np.uint64),
        ),
    )
    tokens.copy_(drawn)
    batch.token_ids[rows, positions.to(torch.int64)] = drawn.clamp_min(0).to(torch.int32)
