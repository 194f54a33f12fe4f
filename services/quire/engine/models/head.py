"""From hidden states to logits."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.engine.models.linear import Linear

# So many of the largest logits are computed again. Those that rounding may have put in front of the true first are
# rarely more than two.
_NUM_LEADERS = 4

# The columns that are first looked at as one.
_BLOCK = 256


class Head:
    """The last product, exact where tokens are decided.

    A product in bfloat16 rounds its results to eight bits. Trained models have largest logits of 20 to 30, which are
    then multiples of 1/8: enough to change two greedy tokens in a hundred. So the leaders are computed again.
    """

    def __init__(self, product: Linear, weight: Tensor) -> None:
        """`weight` [vocab_size, hidden_size] of any float type is what `product` multiplies with."""
        self._product = product
        self._weight = weight

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden float32 [N, hidden_size] → float32 [N, vocab_size]."""
        logits = self._product(hidden)
        rounded = logits.dtype is torch.bfloat16
        logits = logits.to(torch.float32)
        if rounded:
            leaders = _leaders(logits)
            weights = self._weight[leaders].to(torch.float32)
            logits.scatter_(1, leaders, torch.bmm(weights, hidden.unsqueeze(-1)).squeeze(-1))
        return logits


def _leaders(logits: Tensor) -> Tensor:
    """The columns of the largest few of each row, int64 [N, leaders].

    They are in the blocks that have the largest maximums: finding those first is four times as quick as one search.
    """
    rows, columns = logits.shape
    if rows == 0 or columns % _BLOCK or columns < _NUM_LEADERS * _BLOCK:
        return logits.topk(min(_NUM_LEADERS, columns), sorted=False).indices
    blocks = logits.view(rows, -1, _BLOCK)
    chosen = blocks.amax(-1).topk(_NUM_LEADERS, sorted=False).indices
    candidates = blocks.gather(1, chosen.unsqueeze(-1).expand(-1, -1, _BLOCK)).view(rows, -1)
    best = candidates.topk(_NUM_LEADERS, sorted=False).indices
    return chosen.gather(1, best // _BLOCK) * _BLOCK + best % _BLOCK
