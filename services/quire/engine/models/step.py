"""What all layers of a step share, made once before the first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.engine.models.model import ForwardBatch
from quire.kernels.paged_attention import AttentionPlan, plan_attention
from quire.kernels.write_pages import WritePlan, plan_writes
from quire.service.pages import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Step:
    """Made by `plan_step`, used by a layer's parts."""

    writes: WritePlan
    attention: Mapping[int, AttentionPlan]  # by the layers' windows
    cos: Tensor  # float32 [T, 1, head_size], of `rotary_table`
    sin: Tensor  # the same
    dtype: torch.dtype  # of the linear layers' inputs


def plan_step(
    batch: ForwardBatch,
    rotary: Tensor,
    windows: Iterable[int],
    num_kv_heads: int,
    kv_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Step:
    """For a batch; `rotary` is float32 [positions, 2, 1, head_size], the pages are of `kv_dtype`."""
    cos, sin = rotary[batch.positions].unbind(1)
    return Step(
        writes=plan_writes(batch.slot_mapping, 2 * num_kv_heads, PAGE_SIZE),
        attention={
            window: plan_attention(
                batch.query_start, batch.context_lens, batch.block_tables, num_kv_heads, PAGE_SIZE, kv_dtype, window
            )
            for window in windows
        },
        cos=cos,
        sin=sin,
        dtype=dtype,
    )
