"""Draws the next tokens of a batch: greedy, temperature, min-p, top-k, top-p, seeds. Vectorised over the rows.

A draw is the inverse of the cumulative distribution at one uniform number, which depends on the request's seed and the
token's position alone: the same seed gives the same output whatever else is in the batch, after a preemption and on
another engine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# A row's maximum is found ten times as quickly as where it is: from so many columns on, it is looked for by blocks.
_BLOCK = 256
_MANY_COLUMNS = 8192

# How many of the most likely tokens are sorted before it is known whether they suffice for every row's top_p.
_FIRST_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """The parameters of N rows, on the host's side of a CPU runner."""

    temperature: Tensor  # float32 [N], 0 is greedy
    top_p: Tensor  # float32 [N], 1 is off
    top_k: Tensor  # int64 [N], 0 is off
    min_p: Tensor  # float32 [N], 0 is off
    seed: np.ndarray[tuple[int], np.dtype[np.uint64]]  # [N]
    position: np.ndarray[tuple[int], np.dtype[np.uint64]]  # [N], of the token to be drawn in its sequence


def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    """The token drawn for each row, int64 [N]; -1 where the logits hold a NaN or nothing but -inf.

    logits: float32 [N, V]. min_p applies before top_k, and that before top_p.
    """
    best, tokens = _largest(logits)
    drawn = torch.nonzero(rows.temperature > 0).squeeze(-1)
    if drawn.numel() > 0:
        uniform = torch.from_numpy(uniforms(rows.seed, rows.position))[drawn]
        scaled = logits[drawn] / rows.temperature[drawn].unsqueeze(-1)
        truncation = _Truncation(rows.top_p[drawn], rows.top_k[drawn], rows.min_p[drawn])
        tokens[drawn] = _draw(scaled, truncation, uniform)
    # A NaN is larger than all else here, so looking at the chosen logits is enough.
    return torch.where(torch.isfinite(best), tokens, -1)


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row and the first column that holds it."""
    rows, columns = logits.shape
    if columns % _BLOCK or columns < _MANY_COLUMNS:
        best, tokens = logits.max(dim=-1)
        return best, tokens
    blocks = logits.view(rows, -1, _BLOCK)
    best, block = blocks.amax(-1).max(dim=-1)
    inside = blocks.gather(1, block.view(rows, 1, 1).expand(-1, 1, _BLOCK)).argmax(-1).squeeze(-1)
    return best, block * _BLOCK + inside


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


@dataclass(frozen=True, slots=True)
class _Truncation:
    """Which of the tokens, the most likely first, may be drawn at all; one entry for each row."""

    top_p: Tensor
    top_k: Tensor
    min_p: Tensor

    @property
    def active(self) -> Tensor:
        return (self.top_p < 1) | (self.top_k > 0) | (self.min_p > 0)

    def __getitem__(self, rows: Tensor) -> _Truncation:
        return _Truncation(self.top_p[rows], self.top_k[rows], self.min_p[rows])


def _draw(logits: Tensor, truncation: _Truncation, uniform: Tensor) -> Tensor:
    tokens = torch.empty(logits.shape[0], dtype=torch.int64)
    active = truncation.active
    free, truncated = (torch.nonzero(chosen).squeeze(-1) for chosen in (~active, active))
    if free.numel() > 0:
        tokens[free] = _invert(torch.softmax(logits[free], dim=-1), uniform[free])
    if truncated.numel() > 0:
        probabilities = torch.softmax(logits[truncated], dim=-1)
        tokens[truncated] = _draw_from_top(probabilities, truncation[truncated], uniform[truncated])
    return tokens


def _draw_from_top(probabilities: Tensor, truncation: _Truncation, uniform: Tensor) -> Tensor:
    vocab_size = probabilities.shape[-1]
    top_p, top_k, min_p = truncation.top_p, truncation.top_k, truncation.min_p
    limit = torch.where(top_k > 0, top_k, vocab_size)
    # Whether top_p's share is of all the mass, or of what top_k and min_p leave.
    whole = (top_k == 0) & (min_p == 0)
    num_candidates = min(vocab_size, _FIRST_CANDIDATES)
    kept = probabilities.topk(num_candidates, dim=-1)
    # A row is settled if its top_k fits, or if all that min_p leaves does, or else the mass that top_p wants. Sorting
    # all is ten times as slow.
    fits = (limit <= num_candidates) | (kept.values[:, -1] < min_p * kept.values[:, 0])
    settled = fits | (whole & (top_p < 1) & (kept.values.sum(dim=-1) >= top_p))
    if num_candidates < vocab_size and not bool(settled.all()):
        kept = probabilities.topk(vocab_size, dim=-1)
    values, tokens = kept.values, kept.indices
    left_out = torch.arange(values.shape[-1]) >= limit.unsqueeze(-1)
    left_out |= values < (min_p * values[:, 0]).unsqueeze(-1)
    values = values.masked_fill(left_out, 0.0)
    mass = torch.where(whole, 1.0, values.sum(dim=-1))
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
