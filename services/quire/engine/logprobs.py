"""Log-probabilities of tokens under the model's own distribution, for those who asked. Called by runners."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.service.request import TokenLogprobs


def report(logits: Tensor, token_ids: Tensor, num_top: list[int]) -> list[TokenLogprobs]:
    """One for each row. logits: float32 [R, V], as the model gave them; token_ids: int64 [R]; num_top: per row."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, token_ids.unsqueeze(-1))
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    top = logprobs.topk(min(max(num_top, default=0), logits.shape[-1]), dim=-1)
    rows = zip(
        chosen.squeeze(-1).tolist(), ranks.tolist(), top.indices.tolist(), top.values.tolist(), num_top, strict=True
    )
    return [
        TokenLogprobs(logprob, rank, tuple(zip(tokens[:wanted], values[:wanted], strict=True)))
        for logprob, rank, tokens, values, wanted in rows
    ]
