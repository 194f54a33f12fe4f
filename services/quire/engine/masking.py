"""The masks of the core's steps: asked for while the forward pass runs, and done without where they are late.

The core calls this around each launch. What was drawn without its masks is void: the core takes it back, and asks again
for those sequences once the late masks have come.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quire.engine.masks import MaskBatch, MaskRequest, MaskSource
from quire.engine.runner import StepMasks
from quire.engine.schedule import Schedule
from quire.engine.sequence import Sequence, SequenceState
from quire.service.errors import QuireError


@dataclass(frozen=True, slots=True)
class _AllAllowed:
    """See quire.engine.masks.MaskTicket."""

    batch: MaskBatch

    def arrives(self, seconds: float) -> bool:
        return True

    def wait(self) -> MaskBatch:
        return self.batch


@dataclass(frozen=True, slots=True)
class _LateMasks:
    """Masks that a step did not wait for. Until they come, or an error does, their like are not asked for."""

    masks: StepMasks
    sequences: tuple[Sequence, ...]


class Masking:
    """Asks `source`. `released` are keys of sequences with grammars that have ended since it was asked last."""

    def __init__(self, source: MaskSource, vocab_size: int) -> None:
        self.released: list[int] = []
        self._source = source
        self._vocab_size = vocab_size
        self._late: _LateMasks | None = None

    def ask(self, schedule: Schedule, constrained: tuple[int, ...], max_forced: int) -> StepMasks | None:
        """For these indexes of the step's work, and for up to `max_forced` tokens that each grammar forces; all tokens
        and drafts before them must be known."""
        if not (constrained or self.released):
            return None
        work, requests = [], []
        for index in constrained:
            sequence = schedule.sequences[index]
            request = sequence.request
            # What ended after this step was launched is drawn without a mask, and dropped.
            if sequence.state is SequenceState.FINISHED or request.constraint is None:
                continue
            verified = schedule.drafts.get(sequence) if schedule.drafts else None
            drafts = verified.token_ids if verified is not None else ()
            tenant, start = request.cache_key.salt, sequence.num_prompt_tokens
            work.append(index)
            requests.append(
                MaskRequest(sequence.key, request.constraint, sequence.token_ids, tenant, drafts, max_forced, start)
            )
        ticket = self._source.begin(requests, self.released)
        self.released = []
        return StepMasks(tuple(work), ticket)

    def do_without(self, schedule: Schedule, masks: StepMasks) -> StepMasks:
        """In the place of a step's masks that are late: they allow everything, so what is drawn is void."""
        self._late = _LateMasks(masks, tuple(schedule.sequences[index] for index in masks.work))
        num_rows = sum(1 + schedule.plan.work[index].num_drafts for index in masks.work)
        rows = np.full((num_rows, -(-self._vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        return StepMasks(masks.work, _AllAllowed(MaskBatch(rows, {})))

    def late_arrive(self, seconds: float) -> dict[Sequence, QuireError] | None:
        """If there were late masks and they have come, or do so within so many seconds: which grammars are broken."""
        if self._late is None or not self._late.masks.arrive(seconds):
            return None
        late, self._late = self._late, None
        errors = late.masks.batch.errors
        return {
            sequence: errors[sequence.key]
            for sequence in late.sequences
            if sequence.key in errors and sequence.state is not SequenceState.FINISHED
        }

    def close(self) -> None:
        """Lets go of the source."""
        self._source.close()
