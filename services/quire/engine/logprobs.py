"""Log-probabilities of tokens under the model's own distribution, for those who asked. Called by runners."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quire.service.request import TokenLogprobs


class Found(NamedTuple):
    """Of R rows, on the device of their logits or on their way from it."""

    chosen: Tensor  # float32 [R], of the chosen token
    ranks: Tensor  # int64 [R], how many are more likely, plus 1
    top_tokens: Tensor  # int64 [R, M], the most likely first
    top_logprobs: Tensor  # float32 [R, M]

    def read(self, num_top: list[int]) -> list[TokenLogprobs]:
        """One for each row, with as many of the most likely tokens as `num_top` says."""
        columns = (values.tolist() for values in self)
        return [
            TokenLogprobs(logprob, rank, tuple(zip(tokens[:wanted], values[:wanted], strict=True)))
            for logprob, rank, tokens, values, wanted in zip(*columns, num_top, strict=True)
        ]


def find(logits: Tensor, token_ids: Tensor, most: int) -> Found:
    """logits: float32 [R, V], as the model gave them; token_ids: int64 [R]; `most` likely tokens of each row."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, token_ids.unsqueeze(-1))
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    top = logprobs.topk(min(most, logits.shape[-1]), dim=-1)
    return Found(chosen.squeeze(-1), ranks, top.indices, top.values)


def report(logits: Tensor, token_ids: Tensor, num_top: list[int]) -> list[TokenLogprobs]:
    """`find` and `read` at once; num_top: per row."""
    return find(logits, token_ids, max(num_top, default=0)).read(num_top)
