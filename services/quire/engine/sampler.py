"""Draws the next tokens of a batch: greedy, temperature, top-k, top-p, seeds. Vectorised over the rows.

A draw is the inverse of the cumulative distribution at one uniform number, which depends on the request's seed and the
token's position alone: the same seed gives the same output whatever else is in the batch, after a preemption and on
another engine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# How many of the most likely tokens are sorted before it is known whether they suffice for every row's top_p.
_FIRST_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """The parameters of N rows, on the host's side of a CPU runner."""

    temperature: Tensor  # float32 [N], 0 is greedy
    top_p: Tensor  # float32 [N], 1 is off
    top_k: Tensor  # int64 [N], 0 is off
    seed: np.ndarray[tuple[int], np.dtype[np.uint64]]  # [N]
    position: np.ndarray[tuple[int], np.dtype[np.uint64]]  # [N], of the token to be drawn in its sequence


def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    """The token drawn for each row, int64 [N]; -1 where the logits hold a NaN or nothing but -inf.

    logits: float32 [N, V]; overwritten. top_k applies before top_p, as in transformers.
    """
    best, tokens = logits.max(dim=-1)
    drawn = torch.nonzero(rows.temperature > 0).squeeze(-1)
    if drawn.numel() > 0:
        uniform = torch.from_numpy(uniforms(rows.seed, rows.position))[drawn]
        scaled = logits[drawn] / rows.temperature[drawn].unsqueeze(-1)
        tokens[drawn] = _draw(scaled, rows.top_p[drawn], rows.top_k[drawn], uniform)
    # max() hands a NaN through, so looking at the chosen logits is enough.
    return torch.where(torch.isfinite(best), tokens, -1)


def uniforms(
    seed: np.ndarray[tuple[int], np.dtype[np.uint64]], position: np.ndarray[tuple[int], np.dtype[np.uint64]]
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """One number in [0, 1) per (seed, position): SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) used as a hash."""
    with np.errstate(over="ignore"):
        state = _mix(seed + np.uint64(0x9E3779B97F4A7C15))
        state = _mix(state + (position + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _draw(logits: Tensor, top_p: Tensor, top_k: Tensor, uniform: Tensor) -> Tensor:
    truncated = (top_p < 1) | (top_k > 0)
    tokens = torch.empty(logits.shape[0], dtype=torch.int64)
    for selected, draw in ((~truncated, _draw_from_all), (truncated, _draw_from_top)):
        rows = torch.nonzero(selected).squeeze(-1)
        if rows.numel() > 0:
            probabilities = torch.softmax(logits[rows], dim=-1)
            tokens[rows] = draw(probabilities, top_p[rows], top_k[rows], uniform[rows])
    return tokens


def _draw_from_all(probabilities: Tensor, top_p: Tensor, top_k: Tensor, uniform: Tensor) -> Tensor:
    return _invert(probabilities, uniform)


def _draw_from_top(probabilities: Tensor, top_p: Tensor, top_k: Tensor, uniform: Tensor) -> Tensor:
    vocab_size = probabilities.shape[-1]
    limit = torch.where(top_k > 0, top_k, vocab_size)
    num_candidates = min(vocab_size, _FIRST_CANDIDATES)
    kept = probabilities.topk(num_candidates, dim=-1)
    # A row is settled if its top_k fits, or if the mass that top_p wants does. Sorting all is ten times as slow.
    settled = (limit <= num_candidates) | ((top_p < 1) & (top_k == 0) & (kept.values.sum(dim=-1) >= top_p))
    if num_candidates < vocab_size and not bool(settled.all()):
        kept = probabilities.topk(vocab_size, dim=-1)
    values, tokens = kept.values, kept.indices
    values = values.masked_fill(torch.arange(values.shape[-1]) >= limit.unsqueeze(-1), 0.0)
    # After top_k the mass is what is left of it; without top_k it is 1, and the sum over the candidates is not.
    mass = torch.where(top_k > 0, values.sum(dim=-1), 1.0)
    before = values.cumsum(dim=-1) - values
    values = values.masked_fill(before >= (top_p * mass).unsqueeze(-1), 0.0)
    return tokens.gather(-1, _invert(values, uniform).unsqueeze(-1)).squeeze(-1)


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds uniform × the total; never one of weight 0."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    target = uniform.unsqueeze(-1) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # Rounding may put the target at the total itself: the last token that has any weight is meant then.
    last = weights.shape[-1] - 1 - (weights > 0).to(torch.int8).flip(-1).argmax(dim=-1)
    return torch.minimum(index, last)
