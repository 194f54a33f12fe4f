"""Attention of a later step of an unrolled head: causal over the first step's keys, and over one of each further step.

The causal part is torch's flash attention, whose log-sum-exp lets each draft be added as one more key. Backwards, the
same kernels with the whole's output and log-sum-exp give the causal part's share of the gradients: dS = P ∘ (dP - D)
needs no more of the other keys. Algorithm: Dao, "FlashAttention-2", 2023, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quire.speculate.compiled import Compiled

_aten = torch.ops.aten


def can_attend(queries: Tensor) -> bool:
    """Whether `attend_with_drafts` takes queries of this device, type and head size."""
    return queries.shape[-1] % 8 == 0 and (queries.is_cpu or queries.dtype in (torch.bfloat16, torch.float16))


def attend_with_drafts(queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """queries [batch, length, heads, head_size]; keys and values of all steps, [batch, length, kv_heads, head_size]
    each → as queries. Differentiable."""
    attended: Tensor = _AttendWithDrafts.apply(len(keys), queries, *keys, *values)  # type: ignore[no-untyped-call]
    return attended


class _AttendWithDrafts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: int, queries: Tensor, *keys_and_values: Tensor) -> Tensor:
        keys, values = keys_and_values[:steps], keys_and_values[steps:]
        out, log_sum, seeds = _flash(queries, keys[0], values[0])
        rows, scale = queries.flatten(0, 1), 1 / math.sqrt(queries.shape[-1])
        attended, total = out.flatten(0, 1).to(torch.float32), log_sum.transpose(1, 2).flatten(0, 1)
        for key, value in zip(keys[1:], values[1:], strict=True):
            attended, total = _with_draft(rows, attended, total, key.flatten(0, 1), value.flatten(0, 1), scale)
        result = attended.to(queries.dtype).view_as(queries)
        ctx.save_for_backward(queries, result, total, *keys, *values, *seeds)
        ctx.steps, ctx.scale = steps, scale
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, steps, scale = gradients[0].contiguous(), ctx.steps, ctx.scale
        queries, result, total, *others = ctx.saved_tensors
        keys, values, seeds = others[:steps], others[steps : 2 * steps], others[2 * steps :]
        log_sum = total.view(*queries.shape[:3]).transpose(1, 2).contiguous()
        by_query, by_key, by_value = _flash_backward(gradient, queries, keys[0], values[0], result, log_sum, seeds)
        rows, above = queries.flatten(0, 1), gradient.flatten(0, 1)
        mean = _row_products(above, result.flatten(0, 1))
        by_row = by_query.flatten(0, 1).to(torch.float32)
        by_keys, by_values = [by_key], [by_value]
        for key, value in zip(keys[1:], values[1:], strict=True):
            by_row, by_key, by_value = _draft_gradients(
                rows, above, mean, total, by_row, key.flatten(0, 1), value.flatten(0, 1), scale
            )
            by_keys.append(by_key.view_as(key))
            by_values.append(by_value.view_as(value))
        return None, by_row.to(queries.dtype).view_as(queries), *by_keys, *by_values


def _flash(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Causal attention as [batch, length, heads, head_size], its log-sum-exp [batch, heads, length], and what a GPU
    wants to see again."""
    given = [tensor.transpose(1, 2) for tensor in (queries, keys, values)]
    if queries.is_cpu:
        out, log_sum = _aten._scaled_dot_product_flash_attention_for_cpu(*given, 0.0, True)
        return out.transpose(1, 2), log_sum, ()
    out, log_sum, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_flash_attention(*given, 0.0, True)
    return out.transpose(1, 2), log_sum, (seed, offset)


def _flash_backward(
    gradient: Tensor, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, log_sum: Tensor, seeds: Any
) -> tuple[Tensor, Tensor, Tensor]:
    given = [tensor.transpose(1, 2) for tensor in (gradient, queries, keys, values, out)]
    if queries.is_cpu:
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, log_sum, 0.0, True)
    else:
        length = queries.shape[1]
        found = _aten._scaled_dot_product_flash_attention_backward(
            *given, log_sum, None, None, length, length, 0.0, True, *seeds
        )
    by_query, by_key, by_value = (tensor.transpose(1, 2) for tensor in found)
    return by_query, by_key, by_value


def _grouped(rows: Tensor, keys: Tensor) -> Tensor:
    """[T, heads, …] → float32 [T, kv_heads, heads of each, …]."""
    return rows.reshape(rows.shape[0], keys.shape[1], -1, *rows.shape[2:]).to(torch.float32)


@Compiled
def _with_draft(
    queries: Tensor, attended: Tensor, log_sum: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One more key and value for each row: attended float32 [T, heads, head_size] and its log-sum-exp [T, heads]."""
    key, value = keys.unsqueeze(2).to(torch.float32), values.unsqueeze(2).to(torch.float32)
    scores = (_grouped(queries, keys) * key).sum(-1) * scale
    before = _grouped(log_sum, keys)
    total = torch.logaddexp(before, scores)
    kept, share = (before - total).exp().unsqueeze(-1), (scores - total).exp().unsqueeze(-1)
    return (_grouped(attended, keys) * kept + share * value).flatten(1, 2), total.flatten(1, 2)


@Compiled
def _row_products(gradient: Tensor, out: Tensor) -> Tensor:
    """D of the algorithm, float32 [T, heads]: each row's gradient times its output."""
    return (gradient.to(torch.float32) * out.to(torch.float32)).sum(-1)


@Compiled
def _draft_gradients(
    queries: Tensor, gradient: Tensor, mean: Tensor, log_sum: Tensor, by_query: Tensor,
    keys: Tensor, values: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What one draft adds to by_query, float32 [T, heads, head_size], and the gradients of its key and value."""
    key, value = keys.unsqueeze(2).to(torch.float32), values.unsqueeze(2).to(torch.float32)
    query, above = _grouped(queries, keys), _grouped(gradient, keys)
    shares = ((query * key).sum(-1) * scale - _grouped(log_sum, keys)).exp()
    by_score = (shares * ((above * value).sum(-1) - _grouped(mean, keys)) * scale).unsqueeze(-1)
    by_key, by_value = (by_score * query).sum(2), (shares.unsqueeze(-1) * above).sum(2)
    return by_query + (by_score * key).flatten(1, 2), by_key.to(keys.dtype), by_value.to(values.dtype)
