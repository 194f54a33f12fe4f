"""Draws the tokens of a step's rows on the device that holds their logits, and finds what is to be reported of them.

On a GPU by kernels that read all parameters from the batch, so that a captured graph serves any mix of requests. The
results equal `quire.engine.adjust`, `quire.engine.sampler` and `quire.engine.logprobs`, which a CPU's runner, and this
one on a CPU, uses. Which slots is in the first N of `batch.columns`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quire.engine.adjust import adjust_logits
from quire.engine.gpu.batch import GpuBatch
from quire.engine.logprobs import find
from quire.engine.sampler import SamplingRows, sample
from quire.kernels.adjust import adjust_logits_triton
from quire.kernels.logprobs import Logprobs, report_triton
from quire.kernels.sample import sample_triton


def adjust(logits: Tensor, batch: GpuBatch, scratch: Tensor) -> None:
    """Penalties, bias and bans of float32 [N, V], in place; scratch from `quire.kernels.adjust.new_scratch`."""
    slots, positions = _rows(logits, batch)
    if logits.is_cuda:
        adjust_logits_triton(logits, slots, positions, batch.token_ids, batch.adjustments, scratch)
    else:
        adjust_logits(
            logits, batch.sampling, batch.token_ids, slots.numpy().astype(np.int64), positions.to(torch.int64)
        )


def draw_tokens(logits: Tensor, batch: GpuBatch, tokens: Tensor) -> None:
    """Writes the token drawn for each row of float32 [N, V] into `tokens`, int [N], and behind its slot's others.

    A row whose logits hold a NaN or nothing but -inf gets -1.
    """
    slots, positions = _rows(logits, batch)
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


def report_tokens(logits: Tensor, batch: GpuBatch, tokens: Tensor, out: Logprobs) -> None:
    """Fills the rows of `out` whose slots want log-probabilities of `tokens` under float32 [N, V], as the model gave
    it."""
    slots, _ = _rows(logits, batch)
    if logits.is_cuda:
        report_triton(logits, slots, tokens, batch.num_logprobs, out)
        return
    rows = (batch.num_logprobs[slots.to(torch.int64)] >= 0).nonzero().squeeze(-1)
    found = find(logits[rows], tokens[rows].clamp_min(0), out.top_tokens.shape[1])
    out.chosen[rows] = found.chosen
    out.ranks[rows] = found.ranks.to(out.ranks.dtype)
    out.top_tokens[rows] = found.top_tokens.to(out.top_tokens.dtype)
    out.top_logprobs[rows] = found.top_logprobs


def _rows(logits: Tensor, batch: GpuBatch) -> tuple[Tensor, Tensor]:
    return batch.columns.drawing_slots[: len(logits)], batch.columns.positions[: len(logits)]
