"""Draws the next tokens of a batch on a GPU: greedy, temperature, min-p, top-k, top-p, seeds.

The same draw as `quire.engine.sampler`, its reference, makes on a CPU, up to rounding: the inverse of the cumulative
distribution at one uniform number, which SplitMix64 makes of the request's seed and the token's position. The
distribution runs over tokens in their own order where nothing truncates it, and in descending order where something
does. No vocabulary is sorted: `quire.kernels.vocab_blocks` reads the logits once, and what is drawn follows from one
block, or from the few hundred candidates that the blocks' maxima leave (`quire.kernels.sample_search`).

All parameters are on the device and by slot, and the token is written where the next step reads its input: a captured
graph serves any mix of requests.
"""
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels._triton import jit, tl
from quire.kernels.sample_search import collect, draw_from_many, rank
from quire.kernels.vocab_blocks import BLOCK, LOG2_E, first_equal, vocab_blocks

# Compared pairwise. A power of two, at least 32.
_CANDIDATES = 512
# Weights below 2^-64 of the greatest are no part of any sum that decides.
_OCTAVES = 64.0


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """By slot, as `quire.engine.sampling_state` has them."""

    temperature: Tensor  # float32, 0 is greedy
    top_p: Tensor  # float32, 1 is off
    top_k: Tensor  # int, 0 is off
    min_p: Tensor  # float32, 0 is off
    seed: Tensor  # int64: the bits of the uint64


def sample_triton(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    parameters: SamplingParameters,
    token_ids: Tensor,
    tokens: Tensor,
) -> None:
    """Writes the token drawn for each row into `tokens`, int [N], and into `token_ids[slot, position]`.

    logits [N, V] of any float type; slots int [N], negative for a row that pads the batch; positions int [N], of the
    token to be drawn in its sequence; token_ids int [slots, length]. Where the logits hold a NaN or +inf or nothing but
    -inf, and in padding rows, `tokens` gets -1; `token_ids` then gets 0, and nothing for padding.
    """
    blocks = vocab_blocks(logits, slots, parameters.temperature, None)
    if token_ids.stride(1) != 1:
        raise ValueError(f"a slot's token_ids must be contiguous, and the strides are {token_ids.stride()}")
    num_rows, num_blocks = blocks.maxima.shape
    device = logits.device
    values = torch.empty((num_rows, _CANDIDATES), dtype=torch.float32, device=device)
    candidates = torch.empty((num_rows, _CANDIDATES), dtype=torch.int32, device=device)
    lists = torch.empty((num_rows, num_blocks), dtype=torch.int32, device=device)
    _draw_kernel[(num_rows,)](
        logits,
        blocks.maxima,
        blocks.sums,
        values,
        candidates,
        lists,
        slots,
        positions,
        parameters.temperature,
        parameters.top_p,
        parameters.top_k,
        parameters.min_p,
        parameters.seed,
        token_ids,
        tokens,
        logits.stride(0),
        logits.shape[1],
        num_blocks,
        token_ids.stride(0),
        BLOCK=BLOCK,
        PADDED=blocks.padded,
        CANDIDATES=_CANDIDATES,
        LOG2_E=LOG2_E,
        OCTAVES=_OCTAVES,
        num_warps=8,
    )


@jit
def _mix(state: tl.tensor) -> tl.tensor:
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@jit
def uniform(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """One number in [0, 1), float64, per (uint64 seed, uint64 position): see `quire.engine.sampler.uniforms`."""
    state = _mix(seed + 0x9E3779B97F4A7C15)
    state = _mix(state + (position + 1) * 0x9E3779B97F4A7C15)
    return (state >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)


@jit
def _draw_kernel(
    logits_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    values_ptr: tl.tensor,
    candidates_ptr: tl.tensor,
    lists_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    num_blocks: tl.tensor,
    token_stride: tl.tensor,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    CANDIDATES: tl.constexpr,
    LOG2_E: tl.constexpr,
    OCTAVES: tl.constexpr,
) -> None:
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        tl.store(tokens_ptr + row, -1)
        return
    block = tl.arange(0, PADDED)
    maxima = tl.load(maxima_ptr + row * num_blocks + block, mask=block < num_blocks, other=float("-inf"))
    best = tl.max(maxima, 0)
    temperature = tl.load(temperature_ptr + slot)
    position = tl.load(positions_ptr + row).to(tl.int64)
    logits_ptr += row * logits_stride
    token = -1
    if tl.abs(best) < float("inf"):
        if temperature <= 0.0:
            token = first_equal(logits_ptr, maxima, best, vocab_size, BLOCK, PADDED)
        else:
            unit = LOG2_E / temperature
            number = uniform(tl.load(seed_ptr + slot).to(tl.uint64, bitcast=True), position.to(tl.uint64, bitcast=True))
            sums = tl.load(sums_ptr + row * num_blocks + block, mask=block < num_blocks, other=0.0)
            top_p = tl.load(top_p_ptr + slot)
            top_k = tl.load(top_k_ptr + slot).to(tl.int32)
            min_p = tl.load(min_p_ptr + slot)
            masses = tl.where(maxima > float("-inf"), sums * tl.exp2((maxima - best) * unit), 0.0)
            if (top_p >= 1.0) & (top_k <= 0) & (min_p <= 0.0):
                token = _draw_from_all(logits_ptr, masses, best, unit, number, vocab_size, BLOCK, PADDED)
            else:
                token = _draw_from_top(
                    logits_ptr, lists_ptr + row * num_blocks, values_ptr + row * CANDIDATES,
                    candidates_ptr + row * CANDIDATES, maxima, tl.sum(masses, 0), best, unit, number, top_p, top_k,
                    min_p, vocab_size, BLOCK, PADDED, CANDIDATES, OCTAVES,
                )  # fmt: skip
    tl.store(tokens_ptr + row, token)
    tl.store(token_ids_ptr + slot * token_stride + position, tl.maximum(token, 0))


@jit
def _draw_from_all(
    logits_ptr: tl.tensor,
    masses: tl.tensor,
    best: tl.tensor,
    unit: tl.tensor,
    number: tl.tensor,
    vocab_size: tl.tensor,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
) -> tl.tensor:
    """The first token whose cumulative mass in the vocabulary's order exceeds number × the total."""
    masses = masses.to(tl.float64)
    block = tl.arange(0, PADDED)
    ends = tl.cumsum(masses, 0)
    target = number * tl.max(ends, 0)
    # Rounding may put the target at the end: the last that has any mass is meant then.
    chosen = tl.minimum(tl.sum((ends <= target).to(tl.int32), 0), tl.max(tl.where(masses > 0.0, block, 0), 0))
    target -= tl.sum(tl.where(block < chosen, masses, 0.0), 0)
    at = tl.arange(0, BLOCK)
    token = chosen * BLOCK + at
    x = tl.load(logits_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    weights = tl.exp2((x - best) * unit).to(tl.float64)
    within = tl.sum((tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
    return chosen * BLOCK + tl.minimum(within, tl.max(tl.where(weights > 0.0, at, 0), 0))


@jit
def _draw_from_top(
    logits_ptr: tl.tensor,
    list_ptr: tl.tensor,
    values_ptr: tl.tensor,
    candidates_ptr: tl.tensor,
    maxima: tl.tensor,
    total: tl.tensor,
    best: tl.tensor,
    unit: tl.tensor,
    number: tl.tensor,
    top_p: tl.tensor,
    top_k: tl.tensor,
    min_p: tl.tensor,
    vocab_size: tl.tensor,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    CANDIDATES: tl.constexpr,
    OCTAVES: tl.constexpr,
) -> tl.tensor:
    """The same in descending order, of what min_p, then top_k, then top_p leave."""
    lowest = best - OCTAVES / unit
    low, suffices = _threshold(maxima, total, best, unit, lowest, top_p, top_k, min_p)
    count = CANDIDATES + 1
    if suffices > 0:
        count = collect(
            logits_ptr, list_ptr, values_ptr, candidates_ptr, maxima, low, float("inf"), vocab_size, BLOCK, PADDED,
            CANDIDATES, 8,
        )  # fmt: skip
    token = -1
    if count <= CANDIDATES:
        tokens, weights, before, mass = rank(values_ptr, candidates_ptr, count, best, unit, CANDIDATES)
        kept = (weights > 0.0) & (weights >= min_p) & ((top_k <= 0) | (before < top_k))
        if (top_k > 0) | (min_p > 0.0):
            total = tl.sum(tl.where(kept, weights, 0.0), 0)
        kept &= mass < tl.where(top_p < 1.0, top_p * total, float("inf"))
        target = number * tl.sum(tl.where(kept, weights, 0.0), 0).to(tl.float64)
        last = tl.max(tl.where(kept & (mass.to(tl.float64) <= target), before, 0), 0)
        token = tl.max(tl.where((before == last) & (tokens >= 0), tokens, -1), 0)
    else:
        token = draw_from_many(
            logits_ptr, list_ptr, values_ptr, candidates_ptr, maxima, total, best, unit, number, lowest, top_p, top_k,
            min_p, vocab_size, BLOCK, PADDED, CANDIDATES,
        )  # fmt: skip
    return token


@jit
def _threshold(
    maxima: tl.tensor,
    total: tl.tensor,
    best: tl.tensor,
    unit: tl.tensor,
    lowest: tl.tensor,
    top_p: tl.tensor,
    top_k: tl.tensor,
    min_p: tl.tensor,
) -> tl.tensor:
    """A logit below which nothing can be drawn, found from the blocks' maxima alone; and whether it is one.

    As many tokens as there are maxima above it are at least as great: a few more in truth.
    """
    weights = tl.exp2((maxima - best) * unit)
    wanted = tl.where(top_k > 0, top_k.to(tl.float32), top_p * total * 1.00001)
    counted = tl.where(top_k > 0, 1.0, weights)
    low = tl.maximum(lowest, tl.min(tl.where(maxima > float("-inf"), maxima, best), 0))
    reached = tl.sum(tl.where(maxima >= low, counted, 0.0), 0) >= wanted
    suffices = (reached | (low <= lowest)).to(tl.int32)
    high = best
    for _ in range(16):
        middle = low + (high - low) * 0.5
        enough = tl.sum(tl.where(maxima >= middle, counted, 0.0), 0) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    if min_p > 0.0:
        # A little lower, for rounding: what is collected is tested again.
        least = best + (tl.log2(min_p) - 0.001) / unit
        low = tl.where((top_k > 0) & (suffices > 0), tl.maximum(low, least), tl.maximum(least, lowest))
        suffices = 1 + suffices
    return low, suffices
