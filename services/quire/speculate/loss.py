"""What a head is trained for: the target's distribution at each of several drafts in a row.

Training-time test: the first draft is made from the target's hidden states, each further one from the head's own, as in
serving. The tokens between are those that were written: a draft after a wrong one is never used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quire.speculate.batches import Batch
from quire.speculate.draft_model import DraftModel, Unroll
from quire.speculate.target import FrozenTarget, HiddenStates

# Rows whose logits over the target's whole vocabulary are there at a time.
_CHUNK_ROWS = 4096


@dataclass(frozen=True, slots=True)
class StepLoss:
    """Of one draft in the row: cross entropy against the target, and how often the target's likeliest token is drafted
    after the tokens that were written. Both are means over the tokens that the target wrote."""

    loss: Tensor
    accuracy: Tensor


def unrolled_losses(model: DraftModel, target: FrozenTarget, batch: Batch, steps: int) -> list[StepLoss]:
    """The losses of `steps` drafts from every token of `batch`."""
    states = target.hidden_states(batch.token_ids, model.config.taps)
    labels = _Labels.of(model, target, states, batch)
    hidden = model.fuse(states.tapped.to(model.fc.weight.dtype))
    unroll, losses = Unroll(), []
    for step in range(steps):
        hidden = model(batch.token_ids.roll(-1 - step, 1), hidden, unroll)
        # Row p predicts the token at p + 2 + step, which the target predicts at p + 1 + step.
        rows = labels.rows[:, 1 + step :]
        kept = (rows.flatten() >= 0).nonzero().squeeze(1)
        drafting = hidden[:, : rows.shape[1]].flatten(0, 1).index_select(0, kept)
        losses.append(labels.compare(model.logits(drafting).to(torch.float32), rows.flatten()[kept]))
    return losses


@dataclass(frozen=True, slots=True)
class _Labels:
    rows: Tensor  # int64 [batch, length - 1], which row of the others tells the token after this one; -1: none
    shares: Tensor  # [N, draft_vocab_size], the target's probabilities among draft tokens
    likeliest: Tensor  # int64 [N], the draft token with the largest
    known: Tensor  # bool [N], whether the likeliest of all tokens is a draft token

    @classmethod
    def of(cls, model: DraftModel, target: FrozenTarget, states: HiddenStates, batch: Batch) -> _Labels:
        wanted = batch.wanted[:, 1:]
        rows = torch.where(wanted, wanted.flatten().cumsum(0).view_as(wanted) - 1, -1)
        drafted = torch.zeros(target.config.vocab_size, dtype=torch.bool, device=target.device)
        drafted[model.target_ids] = True
        shares, likeliest, known = [], [], []
        for last in torch.split(states.last[:, :-1][wanted], _CHUNK_ROWS):
            of_all = target.logits(last)
            known.append(drafted[of_all.argmax(-1)])
            of_drafts = of_all[:, model.target_ids]
            likeliest.append(of_drafts.argmax(-1))
            shares.append(of_drafts.softmax(-1, dtype=torch.float32).to(target.dtype))
        return cls(rows, torch.cat(shares), torch.cat(likeliest), torch.cat(known))

    def compare(self, logits: Tensor, rows: Tensor) -> StepLoss:
        known = self.known[rows]
        entropy = F.cross_entropy(logits, self.shares[rows].to(torch.float32), reduction="none")
        right = (logits.argmax(-1) == self.likeliest[rows]) & known
        count = max(1, len(rows))
        # The published recipe: a token that can't be drafted teaches nothing.
        return StepLoss((entropy * known).sum() / count, right.sum() / count)
