"""Draft tokens in process: the sidecar's work without the sidecar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quire.engine.speculation.drafts import DraftRequest
from quire.sidecar.drafting.drafter import Drafter, DraftingLimits


@dataclass(frozen=True, slots=True)
class _Ticket:
    """See quire.engine.speculation.drafts.DraftTicket."""

    drafts: Mapping[int, tuple[int, ...]]

    def wait(self) -> Mapping[int, tuple[int, ...]]:
        return self.drafts


class SuffixDrafts:
    """A DraftSource: see quire.engine.speculation.drafts. It reads all that it is told at once: of a prompt that costs
    little beside the model."""

    def __init__(self) -> None:
        self._drafter = Drafter(DraftingLimits())
        self._told: dict[int, int] = {}

    def begin(self, requests: Sequence[DraftRequest], released: Sequence[int]) -> _Ticket:
        """The drafts, which are there when this returns."""
        for sequence in released:
            self._drafter.release(sequence)
            self._told.pop(sequence, None)
        for request in requests:
            if request.sequence not in self._told:
                self._drafter.start(request.sequence, request.tenant, request.num_prompt_tokens)
            new = request.token_ids[self._told.get(request.sequence, 0) :]
            self._told[request.sequence] = len(request.token_ids)
            self._drafter.draft(request.sequence, new, 0)
        while self._drafter.catch_up():
            pass
        drafts = {
            request.sequence: self._drafter.draft(request.sequence, (), request.num_tokens) for request in requests
        }
        return _Ticket({sequence: tokens for sequence, tokens in drafts.items() if tokens})

    def close(self) -> None:
        """There is nothing to let go of."""
