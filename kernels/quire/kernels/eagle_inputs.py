"""What an EAGLE head begins with: each token's embedding beside the model's state before it, both normalized.

At one request of a small model a step is a chain of launches, and the torch operations in here were half of those that
a head adds to it: they are one launch, which finds the rows' tokens, too.
"""
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quire.kernels._triton import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    may_overlap,
    next_power_of_2,
    overlap_option,
    tl,
)
from quire.kernels.rms_norm import rms_norm
from quire.kernels.step_inputs import StepInputs, StepSource, find_rows, prepare_inputs


@dataclass(frozen=True, slots=True)
class EagleNorms:
    """RMS norms of EAGLE-3's two inputs; `quire.kernels.rms_norm`."""

    embedding: Tensor  # [H], of any float type on a GPU, float32 on a CPU
    hidden: Tensor  # the same
    eps: float


def eagle_inputs(
    token_ids: Tensor,
    embedding: Tensor,
    hidden: Tensor,
    norms: EagleNorms | None,
    residual: Tensor,
    keep_normed: bool = False,
) -> Tensor:
    """[T, 2 H] of embedding's type, as they are if there are no `norms`; `residual`, a tensor of its own, is filled
    with the states, normalized if `keep_normed`.

    token_ids int [T]; embedding [vocab_size, H]; hidden and residual [T, H] of embedding's type, rows of hidden may be
    strided.
    """
    if hidden.is_cuda:
        return eagle_inputs_triton(token_ids, embedding, hidden, norms, residual, keep_normed)
    embedded, state, dtype = F.embedding(token_ids, embedding), hidden, embedding.dtype
    if norms is not None:
        embedded = rms_norm(embedded, norms.embedding, norms.eps, dtype)
        state = rms_norm(hidden, norms.hidden, norms.eps, dtype)
    residual.copy_(state if keep_normed else hidden)
    return torch.cat((embedded, state), 1)


def found_eagle_inputs(
    source: StepSource, rows: StepInputs, embedding: Tensor, hidden: Tensor, norms: EagleNorms | None, residual: Tensor
) -> Tensor:
    """`eagle_inputs` of the tokens one position after those of `source`, which `rows` is filled with."""
    if hidden.is_cuda:
        return found_eagle_inputs_triton(source, rows, embedding, hidden, norms, residual)
    prepare_inputs(source, rows, ahead=1)
    return eagle_inputs(rows.token_ids, embedding, hidden, norms, residual)


@jit
def _inputs_kernel(
    query_start_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,
    embedding_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    embedding_norm_ptr: tl.tensor,
    hidden_norm_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens_stride: tl.tensor,
    tables_stride: tl.tensor,
    num_seqs: tl.tensor,
    hidden_stride: tl.tensor,
    eps: tl.tensor,
    FIND: tl.constexpr,
    NORM: tl.constexpr,
    KEEP_NORMED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    embedding_norm = tl.zeros((BLOCK,), tl.float32)
    hidden_norm = tl.zeros((BLOCK,), tl.float32)
    if NORM:
        embedding_norm = tl.load(embedding_norm_ptr + column, mask=inside, other=0.0).to(tl.float32)
        hidden_norm = tl.load(hidden_norm_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    raw = tl.load(hidden_ptr + row * hidden_stride + column, mask=inside, other=0.0)
    if FIND:
        one = tl.program_id(0) + tl.arange(0, 1)
        _, there, slot, position, place = find_rows(
            one, query_start_ptr, slots_ptr, starts_ptr, tables_ptr, tables_stride, num_seqs, 1, PAGE_SIZE, BLOCK_SEQS
        )
        found = tl.load(tokens_ptr + slot * tokens_stride + position, mask=there, other=0)
        tl.store(token_ids_ptr + one, found)
        tl.store(positions_ptr + one, position)
        tl.store(slot_mapping_ptr + one, place)
        token = tl.sum(found, 0).to(tl.int64)
    else:
        token = tl.load(token_ids_ptr + row).to(tl.int64)
    embedded = tl.load(embedding_ptr + token * SIZE + column, mask=inside, other=0.0)
    state = raw
    if NORM:
        x = embedded.to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps) * embedding_norm
        embedded = x.to(out_ptr.dtype.element_ty)
        h = raw.to(tl.float32)
        h = h * tl.rsqrt(tl.sum(h * h, 0) / SIZE + eps) * hidden_norm
        state = h.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * (2 * SIZE) + column, embedded, mask=inside)
    tl.store(out_ptr + row * (2 * SIZE) + SIZE + column, state, mask=inside)
    tl.store(residual_ptr + row * SIZE + column, state if KEEP_NORMED else raw, mask=inside)


def eagle_inputs_triton(
    token_ids: Tensor,
    embedding: Tensor,
    hidden: Tensor,
    norms: EagleNorms | None,
    residual: Tensor,
    keep_normed: bool = False,
) -> Tensor:
    """`eagle_inputs` in one launch."""
    rows = StepInputs(token_ids, token_ids, token_ids)
    return _launch(None, rows, embedding, hidden, norms, residual, keep_normed)


def found_eagle_inputs_triton(
    source: StepSource, rows: StepInputs, embedding: Tensor, hidden: Tensor, norms: EagleNorms | None, residual: Tensor
) -> Tensor:
    """`found_eagle_inputs` in one launch."""
    return _launch(source, rows, embedding, hidden, norms, residual, False)


def _launch(
    source: StepSource | None,
    rows: StepInputs,
    embedding: Tensor,
    hidden: Tensor,
    norms: EagleNorms | None,
    residual: Tensor,
    keep_normed: bool,
) -> Tensor:
    num_rows, size = hidden.shape
    if hidden.stride(1) != 1 or not (residual.is_contiguous() and embedding.is_contiguous()):
        raise ValueError(
            "embedding, residual and the rows of hidden must be contiguous, and their strides are "
            f"{embedding.stride()}, {residual.stride()} and {hidden.stride()}"
        )
    if residual.shape != hidden.shape or embedding.shape[1] != size or len(rows.token_ids) != num_rows:
        raise ValueError(
            f"there must be {num_rows} tokens, a residual of {list(hidden.shape)} and embeddings of {size}: they are "
            f"{len(rows.token_ids)}, {list(residual.shape)} and {embedding.shape[1]}"
        )
    out = torch.empty((num_rows, 2 * size), dtype=embedding.dtype, device=hidden.device)
    block, overlaps, unused = next_power_of_2(size), may_overlap(hidden.device), rows.token_ids
    _inputs_kernel[(num_rows,)](
        unused if source is None else source.query_start,
        unused if source is None else source.slots,
        unused if source is None else source.starts,
        unused if source is None else source.token_ids,
        unused if source is None else source.block_tables,
        rows.token_ids,
        rows.positions,
        rows.slot_mapping,
        embedding,
        hidden,
        embedding if norms is None else norms.embedding,
        embedding if norms is None else norms.hidden,
        residual,
        out,
        0 if source is None else source.token_ids.stride(0),
        0 if source is None else source.block_tables.stride(0),
        1 if source is None else len(source.slots),
        hidden.stride(0),
        0.0 if norms is None else norms.eps,
        FIND=source is not None,
        NORM=norms is not None,
        KEEP_NORMED=keep_normed,
        PAGE_SIZE=1 if source is None else source.page_size,
        BLOCK_SEQS=1 if source is None else next_power_of_2(len(source.slots)),
        SIZE=size,
        BLOCK=block,
        DEPENDENT=overlaps,
        num_warps=min(16, max(1, block // 512)),
        **overlap_option(overlaps),
    )
    return out
