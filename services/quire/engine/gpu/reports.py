"""Log-probabilities computed on the device when a step runs, and read when its tokens are: `quire.engine.logprobs`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.engine.device_batch import Draws
from quire.engine.logprobs import Found, find
from quire.service.request import TokenLogprobs

# Rows whose logits are there at a time: a long prompt's would fill the memory.
_ROWS = 256


@dataclass(frozen=True, slots=True)
class TokenReport:
    """On drawn tokens: those of `rows` of the step's draws. `found` has one of each row, and may be longer."""

    rows: npt.NDArray[np.int64]
    num_top: npt.NDArray[np.int64]  # of each of `rows`
    found: Found

    def read(self, draws: Draws, accepted: npt.NDArray[np.int64]) -> dict[int, tuple[TokenLogprobs, ...]]:
        """By item of the step's work, on those that count; to be called when the step is done."""
        counts = draws.counting(self.rows, accepted)
        rows = self.rows[counts]
        one_each = Found(*(values[torch.from_numpy(rows)] for values in self.found)).read(self.num_top[counts].tolist())
        return draws.by_item(rows, one_each)


@dataclass(frozen=True, slots=True)
class PromptReport:
    """On a part of a prompt: `item` is its index in the step's work."""

    item: int
    num_top: int
    found: list[Found]

    @classmethod
    def of(
        cls, item: int, hidden: Tensor, token_ids: Tensor, num_top: int, logits: Callable[[Tensor], Tensor]
    ) -> PromptReport:
        """hidden: [R, hidden_size], of which `logits` makes logits; token_ids: int [R], the tokens that came."""
        starts = range(0, len(hidden), _ROWS)
        found = [
            _find(logits(hidden[start : start + _ROWS]), token_ids[start : start + _ROWS], num_top) for start in starts
        ]
        return cls(item, num_top, found)

    def read(self) -> list[TokenLogprobs]:
        """One for each token; to be called when the step is done."""
        return [one for found in self.found for one in found.read([self.num_top] * len(found.chosen))]


def _find(logits: Tensor, token_ids: Tensor, most: int) -> Found:
    """On its way to the host."""
    return Found(*(_to_host(values) for values in find(logits, token_ids.to(torch.int64), most)))


def _to_host(values: Tensor) -> Tensor:
    if not values.is_cuda:
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
