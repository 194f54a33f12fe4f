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
from quire.speculate.compiled import Compiled
from quire.speculate.draft_model import DraftModel, Unroll
from quire.speculate.soft_entropy import log_sums, soft_entropy
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
    compare = labels.compare if model.fused else labels.compare_plainly
    hidden = model.fuse(states.tapped)
    unroll, losses = Unroll(), []
    for step in range(steps):
        hidden = model(batch.token_ids.roll(-1 - step, 1), hidden, unroll)
        losses.append(compare(model, hidden, step))
    return losses


@Compiled
def _likeliest(logits: Tensor, place: Tensor) -> Tensor:
    """The place of each row's likeliest token."""
    return place[logits.argmax(-1)]


@dataclass(frozen=True, slots=True)
class _Labels:
    """Of every token that the target wrote, [N]."""

    before: Tensor  # int64, where the token before it stands in [batch × length]
    logits: Tensor  # [N, draft_vocab_size], the target's for draft tokens
    sums: Tensor  # float32, their log-sum-exps
    likeliest: Tensor  # int64, the draft token that is the likeliest of all tokens; -1: that is none

    @classmethod
    def of(cls, model: DraftModel, target: FrozenTarget, states: HiddenStates, batch: Batch) -> _Labels:
        last = states.last.flatten(0, 1).index_select(0, batch.before)
        place = torch.full((target.config.vocab_size,), -1, device=target.device)
        place[model.target_ids] = torch.arange(len(model.target_ids), device=target.device)
        likeliest = [_likeliest(target.logits(rows), place) for rows in torch.split(last, _CHUNK_ROWS)]
        logits = target.draft_logits(last, model.target_ids)
        return cls(batch.before, logits, log_sums(logits), torch.cat(likeliest))

    def compare(self, model: DraftModel, hidden: Tensor, step: int) -> StepLoss:
        """hidden [batch, length, hidden_size] of step `step` with what the target predicts there."""
        rows, there = self._rows(hidden, step)
        importance = (there & (self.likeliest >= 0)).to(torch.float32)
        entropy, largest = soft_entropy(model.normed(rows), model.lm_head.weight, self.logits, self.sums, importance)
        return self._mean(entropy, largest, there)

    def compare_plainly(self, model: DraftModel, hidden: Tensor, step: int) -> StepLoss:
        """`compare`, as a textbook has it."""
        rows, there = self._rows(hidden, step)
        logits = model.logits(rows).to(torch.float32)
        entropies = F.cross_entropy(logits, self.logits.softmax(-1, dtype=torch.float32), reduction="none")
        return self._mean((entropies * (there & (self.likeliest >= 0))).sum(), logits.argmax(-1), there)

    def _rows(self, hidden: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The row that drafts each token, and whether there is one: row p predicts the token at p + 2 + step."""
        there = self.before % hidden.shape[1] > step
        return hidden.flatten(0, 1).index_select(0, (self.before - 1 - step).clamp_min(0)), there

    def _mean(self, entropy: Tensor, largest: Tensor, there: Tensor) -> StepLoss:
        # The published recipe: a token that can't be drafted teaches nothing.
        count = there.sum().clamp_min(1)
        return StepLoss(entropy / count, ((largest == self.likeliest) & there).sum() / count)
