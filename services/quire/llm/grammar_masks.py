"""Token masks from llguidance, filled in a thread beside the model: the sidecar's work without the sidecar.

A constraint is compiled in this process: unlike a server's, its author and the one who waits for it are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from quire.engine.masks import DraftResult, MaskBatch, MaskRequest, first_rows
from quire.service.checkpoint import TextModel
from quire.service.request import Constraint
from quire.sidecar.config import MaskLimits
from quire.sidecar.grammar.batch import MaskRow
from quire.sidecar.grammar.compile import build_tokenizer
from quire.sidecar.grammar.compiled import CompiledGrammar
from quire.sidecar.grammar.explain import explained
from quire.sidecar.grammar.fill import MaskFiller
from quire.sidecar.grammar.matcher import SequenceMatcher

_CACHED_GRAMMARS = 256
_LIMITS = MaskLimits(row_seconds=60.0, step_seconds=600.0, token_seconds=60.0)


@dataclass(slots=True)
class _Place:
    """Where a sequence is in its grammar: its first `consumed` output tokens are taken into account."""

    matcher: SequenceMatcher
    consumed: int = 0


@dataclass(frozen=True, slots=True)
class _Ticket:
    """See quire.engine.masks.MaskTicket."""

    batch: Future[MaskBatch]

    def arrives(self, seconds: float) -> bool:
        return True

    def wait(self) -> MaskBatch:
        return self.batch.result()


class GrammarMasks:
    """A MaskSource for one model; see quire.engine.masks. Raises ModelError if its outputs can never end."""

    def __init__(self, text: TextModel) -> None:
        self._tokenizer = build_tokenizer(text)
        self._words = -(-text.vocab_size // 32)
        self._filler = MaskFiller(0, _LIMITS)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fill")
        self._compiled = lru_cache(_CACHED_GRAMMARS)(self._compile)
        self._places: dict[int, _Place] = {}
        # A step's masks are read before the next one's are asked for. New memory would be mapped page by page.
        self._bitmask = np.empty((0, self._words), np.int32)

    def compile(self, constraint: Constraint) -> None:
        """Raises InvalidRequestError if `constraint` is wrong, not supported, or exceeds llguidance's limits."""
        self._compiled(constraint)

    def begin(self, requests: Sequence[MaskRequest], released: Sequence[int]) -> _Ticket:
        """Starts to fill row i for `requests[i]` and returns at once; `released` sequences have ended."""
        for sequence in released:
            self._places.pop(sequence, None)
        rows = [self._row(row, request) for row, request in zip(first_rows(requests), requests, strict=True)]
        return _Ticket(self._thread.submit(self._fill, rows))

    def close(self) -> None:
        """Ends the threads."""
        self._thread.shutdown()
        self._filler.close()

    def _compile(self, constraint: Constraint) -> CompiledGrammar:
        with explained(constraint):
            return CompiledGrammar(self._tokenizer, constraint)

    def _row(self, row: int, request: MaskRequest) -> MaskRow:
        place = self._places.get(request.sequence)
        if place is None:
            matcher = SequenceMatcher(self._compiled(request.constraint), _LIMITS)
            place = self._places[request.sequence] = _Place(matcher)
        accepted = list(request.outputs(place.consumed))
        place.consumed += len(accepted)
        return MaskRow(request.sequence, row, place.matcher, accepted, request.drafts, request.max_forced)

    def _fill(self, rows: Sequence[MaskRow]) -> MaskBatch:
        num_rows = sum(1 + len(row.drafts) for row in rows)
        if len(self._bitmask) < num_rows:
            self._bitmask = np.empty((num_rows, self._words), np.int32)
        bitmask = self._bitmask[:num_rows]
        filled = self._filler.fill(rows, bitmask)
        for row in rows if filled.errors else ():
            if row.sequence in filled.errors:
                # It must still be possible to draw a token, which is dropped.
                bitmask[row.row : row.row + 1 + len(row.drafts)] = -1
        results = {
            row.sequence: DraftResult(result.num_drafts, tuple(result.forced))
            for row in rows
            if (row.drafts or row.max_forced) and (result := filled.results.get(row.sequence)) is not None
        }
        return MaskBatch(bitmask.view(np.uint32), filled.errors, results)
