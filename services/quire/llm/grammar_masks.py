"""Token masks from llguidance, filled in a thread beside the model: the sidecar's work without the sidecar.

A constraint is compiled in this process: unlike a server's, its author and the one who waits for it are the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from quire.engine.masks import MaskBatch, MaskRequest
from quire.service.checkpoint import TextModel
from quire.service.request import Constraint
from quire.sidecar.grammar.compile import build_tokenizer
from quire.sidecar.grammar.compiler import CompiledGrammar
from quire.sidecar.grammar.explain import compile_explained
from quire.sidecar.grammar.fill import MaskFiller, MaskRow
from quire.sidecar.grammar.matcher import SequenceMatcher

_CACHED_GRAMMARS = 256


@dataclass(slots=True)
class _Place:
    """Where a sequence is in its grammar: its first `consumed` output tokens are taken into account."""

    matcher: SequenceMatcher
    consumed: int = 0


@dataclass(frozen=True, slots=True)
class _Ticket:
    """See quire.engine.masks.MaskTicket."""

    batch: Future[MaskBatch]

    def wait(self) -> MaskBatch:
        return self.batch.result()


class GrammarMasks:
    """A MaskSource for one model; see quire.engine.masks. Raises ModelError if its outputs can never end."""

    def __init__(self, text: TextModel) -> None:
        self._tokenizer = build_tokenizer(text)
        self._words = -(-text.vocab_size // 32)
        self._filler = MaskFiller(0)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fill")
        self._compiled = lru_cache(_CACHED_GRAMMARS)(self._compile)
        self._places: dict[int, _Place] = {}

    def compile(self, constraint: Constraint) -> None:
        """Raises InvalidRequestError if `constraint` is wrong, not supported, or exceeds llguidance's limits."""
        self._compiled(constraint)

    def begin(self, requests: Sequence[MaskRequest], released: Sequence[int]) -> _Ticket:
        """Starts to fill row i for `requests[i]` and returns at once; `released` sequences have ended."""
        for sequence in released:
            self._places.pop(sequence, None)
        rows = [self._row(index, request) for index, request in enumerate(requests)]
        return _Ticket(self._thread.submit(self._fill, rows))

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()

    def _compile(self, constraint: Constraint) -> CompiledGrammar:
        began = time.perf_counter()
        matcher = compile_explained(self._tokenizer, constraint)
        return CompiledGrammar(constraint, matcher, len(constraint.source), time.perf_counter() - began)

    def _row(self, index: int, request: MaskRequest) -> MaskRow:
        place = self._places.get(request.sequence)
        if place is None:
            place = self._places[request.sequence] = _Place(SequenceMatcher(self._compiled(request.constraint)))
        accepted = list(request.output_token_ids[place.consumed :])
        place.consumed += len(accepted)
        return MaskRow(request.sequence, index, place.matcher, accepted)

    def _fill(self, rows: Sequence[MaskRow]) -> MaskBatch:
        # Rows of sequences with an error stay all ones: it must still be possible to draw a token, which is dropped.
        bitmask = np.full((len(rows), self._words), -1, np.int32)
        errors = self._filler.fill(rows, bitmask)
        for row in rows:
            if row.sequence in errors:
                bitmask[row.row] = -1
        return MaskBatch(bitmask.view(np.uint32), errors)
