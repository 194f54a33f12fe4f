"""How many tokens a step a head is good for: chains or trees of its drafts against the target's own greedy output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.speculate.batches import Batch
from quire.speculate.compiled import as_written
from quire.speculate.dialogues import Dialogue
from quire.speculate.draft_model import DraftModel, Unroll
from quire.speculate.target import FrozenTarget


@dataclass(slots=True)
class Acceptance:
    """Steps of verification, the tokens that they gave, and how often draft i was accepted."""

    accepted: list[int]
    steps: int = 0
    tokens: int = 0

    @property
    def length(self) -> float:
        """Tokens a step: the accepted drafts and the one that the target draws itself. 1 is no draft at all."""
        return self.tokens / max(1, self.steps)

    @property
    def rates(self) -> tuple[float, ...]:
        """For each place in the chain, the share of steps whose draft was accepted there."""
        return tuple(count / max(1, self.steps) for count in self.accepted)

    def add(self, other: Acceptance) -> None:
        """Counts `other` in."""
        self.accepted = [a + b for a, b in zip(self.accepted, other.accepted, strict=True)]
        self.steps += other.steps
        self.tokens += other.tokens


@torch.no_grad()
@as_written()
def greedy_acceptance(
    model: DraftModel, target: FrozenTarget, dialogues: Sequence[Dialogue], num_drafts: int, num_siblings: int = 0
) -> dict[str, Acceptance]:
    """By kind, for dialogues whose spans are the target's greedy output after the tokens before them. The chains are
    trees where second choices are verified beside the first `num_siblings` drafts.

    Greedy verification accepts what equals that output, so that its steps can be told without running them: drafts are
    made from every token at once, and a step begins where the one before ended.
    """
    found: dict[str, Acceptance] = {}
    for dialogue in dialogues:
        batch = Batch.of([dialogue], len(dialogue.token_ids)).to(target.device)
        right = _right_drafts(model, target, batch.token_ids, num_drafts, num_siblings)[0].tolist()
        own = found.setdefault(dialogue.kind, Acceptance([0] * num_drafts))
        for begin, end in dialogue.spans:
            own.add(_walk(right, begin, end, num_drafts))
    return found


def total(parts: Iterable[Acceptance], num_drafts: int) -> Acceptance:
    """All of them together."""
    result = Acceptance([0] * num_drafts)
    for part in parts:
        result.add(part)
    return result


def _right_drafts(
    model: DraftModel, target: FrozenTarget, token_ids: Tensor, num_drafts: int, num_siblings: int
) -> Tensor:
    """How many drafts in a row, made from each row p, are the tokens from p + 2 on, the last of them perhaps a second
    choice: int64 [batch, length]."""
    states = target.hidden_states(token_ids, model.config.taps)
    hidden, unroll = model.fuse(states.tapped), Unroll()
    inputs = token_ids.roll(-1, 1)
    so_far = torch.ones_like(token_ids, dtype=torch.bool)
    count = torch.zeros_like(token_ids)
    for step in range(num_drafts):
        hidden = model(inputs, hidden, unroll)
        inputs, second = model.target_ids[model.logits(hidden).topk(2).indices].unbind(-1)
        truth = token_ids.roll(-2 - step, 1)
        if step < num_siblings:
            count += so_far & (inputs != truth) & (second == truth)
        so_far &= inputs == truth
        count += so_far
    return count


def _walk(right: Sequence[int], begin: int, end: int, num_drafts: int) -> Acceptance:
    """The first token of [begin, end) comes from the prompt; each step follows on the last token that is known."""
    found = Acceptance([0] * num_drafts)
    last = begin
    while last + 1 < end:
        # What is past the end of the output would be cut off; the target's own token is one of the step's.
        accepted = min(right[last - 1], end - 1 - last)
        found.steps += 1
        found.tokens += min(accepted + 1, end - 1 - last)
        for place in range(accepted):
            found.accepted[place] += 1
        last += accepted + 1
    return found
