"""One sequence's place in its grammar, and what its masks have cost so far."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher

from quire.service.errors import InternalError, QuireError
from quire.service.request import ConstraintKind
from quire.sidecar.config import MaskLimits
from quire.sidecar.grammar.compile import refusal
from quire.sidecar.grammar.compiled import CompiledGrammar

# llguidance tells these from limits that were exceeded only in its words.
_NOT_ALLOWED = "doesn't satisfy the grammar"
_NO_TOKEN = "out of range"
_LEXER_IS_FULL = re.compile(r"lexer error: too many")
_LEXER_WAS_FULL = "lexer error: too many states"
_TAIL = "\n<non-verbose/>"
# Of a matcher whose masks take longer nobody else's wait.
_QUICK_S = 0.005
# llguidance consumes tokens with the GIL held: a long replay lets go of it now and then.
_TOKENS_AT_ONCE = 16


class RowResult(NamedTuple):
    """The grammar allows the first `num_drafts` drafts; `forced` are the tokens that it forces after them."""

    num_drafts: int = 0
    forced: Sequence[int] = ()


_NOTHING = RowResult()


class SequenceMatcher:
    """A sequence's grammar and how far its output got in it; not to be used from two threads at once.

    Once `error` is set there are no more masks. `seconds` is the CPU time that the last ones took. Masks of the same
    `lexer` are computed one at a time.
    """

    def __init__(self, grammar: CompiledGrammar, limits: MaskLimits) -> None:
        self.error: QuireError | None = None
        self.seconds = 0.0
        self.lexer = grammar.join(self)
        self._grammar = grammar
        self._limits = limits
        # Both are the lexer's, from the first mask on.
        self._matcher: LLMatcher
        self._generation = -1
        self._token_ids: list[int] = []
        self._renewed_at = -1
        self._seconds_left = limits.row_seconds

    @property
    def is_quick(self) -> bool:
        """Whether its last masks took no longer than many others' together."""
        return self._generation >= 0 and self.seconds <= _QUICK_S

    @property
    def kind(self) -> ConstraintKind:
        """The kind of its constraint."""
        return self._grammar.constraint.kind

    def fill(
        self, accepted: Sequence[int], drafts: Sequence[int], max_forced: int, masks: npt.NDArray[np.int32]
    ) -> RowResult:
        """Consumes `accepted`, then writes the mask that follows them and one for each allowed draft.

        `masks` is int32 [at least 1 + drafts, ceil(vocab_size / 32)] and contiguous. The state afterwards is that after
        `accepted`. Sets `error` if a token of `accepted` is not allowed or a limit is exceeded.
        """
        if self._generation < 0:
            self._matcher, self._generation = self.lexer.start()
        began = time.thread_time()
        self._token_ids += accepted
        self._consume(accepted)
        result = self._fill(drafts, max_forced, masks)
        while self._matcher.is_error() and self._renew():
            result = self._fill(drafts, max_forced, masks)
        self.seconds = time.thread_time() - began
        self.error = self._grammar_error() or self._spend(len(accepted) + 1 + result.num_drafts)
        return result

    @staticmethod
    def fill_together(
        executor: LLExecutor,
        matchers: Sequence[SequenceMatcher],
        accepted: Sequence[Sequence[int]],
        max_forced: Sequence[int],
        masks: npt.NDArray[np.int32],
    ) -> list[RowResult]:
        """`fill` of many that are quick, without drafts, in llguidance's own threads, which need no GIL.

        Nobody else may use their lexers meanwhile. What each takes is not known, and `seconds` stay as they are.
        """
        tokens, places = [], []
        for index, (matcher, token_ids) in enumerate(zip(matchers, accepted, strict=True)):
            matcher._token_ids += token_ids
            places.append((matcher._matcher, index))
            if len(token_ids) == 1:
                tokens.append((matcher._matcher, token_ids[0]))
            else:
                matcher._consume(token_ids)
        if tokens:
            executor.consume_token_par(tokens)
        executor.unsafe_compute_mask_ptr(places, masks.ctypes.data, masks.strides[0], len(masks))
        return [
            matcher._finish(count, masks, index)
            for index, (matcher, count) in enumerate(zip(matchers, max_forced, strict=True))
        ]

    def _finish(self, max_forced: int, masks: npt.NDArray[np.int32], row: int) -> RowResult:
        """What is left to do when the mask is there."""
        if self._matcher.is_error():
            return self.fill((), (), max_forced, masks[row : row + 1])
        self.error = self._spend(2)
        if not self._may_force(max_forced):
            return _NOTHING
        return RowResult(0, self._matcher.compute_ff_tokens()[:max_forced])

    def _may_force(self, max_forced: int) -> bool:
        return max_forced > 0 and not self._matcher.is_stopped()

    def _consume(self, token_ids: Sequence[int]) -> None:
        for start in range(0, len(token_ids), _TOKENS_AT_ONCE):
            self._matcher.consume_tokens(list(token_ids[start : start + _TOKENS_AT_ONCE]))

    def _fill(self, drafts: Sequence[int], max_forced: int, masks: npt.NDArray[np.int32]) -> RowResult:
        matcher, address, row_bytes = self._matcher, masks.ctypes.data, masks.strides[0]
        matcher.unsafe_compute_mask_ptr(address, row_bytes)
        consumed = 0
        for draft in drafts:
            if matcher.is_error() or not _allows(masks[consumed], draft):
                break
            if draft in self._grammar.end_token_ids:
                # Not consumed: llguidance does not always count an end token, and could not take it back.
                masks[consumed + 1] = self._grammar.end_mask
                return self._undo(consumed, RowResult(consumed + 1))
            matcher.consume_token(draft)
            consumed += 1
            matcher.unsafe_compute_mask_ptr(address + consumed * row_bytes, row_bytes)
        forced = matcher.compute_ff_tokens()[:max_forced] if self._may_force(max_forced) else ()
        return self._undo(consumed, RowResult(consumed, forced))

    def _undo(self, consumed: int, result: RowResult) -> RowResult:
        if consumed:
            self._matcher.rollback(consumed)
        return result

    def _renew(self) -> bool:
        """Goes on with a new lexer, if the old one is full and this sequence has got anywhere since the last one."""
        if not _LEXER_IS_FULL.search(self._reason()) or self._renewed_at == len(self._token_ids):
            return False
        self.lexer.renew(self._generation)
        self._matcher, self._generation = self.lexer.start()
        self._renewed_at = len(self._token_ids)
        self._consume(self._token_ids)
        return True

    def _reason(self) -> str:
        """Why the matcher stopped. One whose lexer fills up amid a token says at first that the token is wrong."""
        reason = self._matcher.get_error()
        if _NOT_ALLOWED in reason:
            other, generation = self.lexer.start()
            if generation != self._generation:
                return _LEXER_WAS_FULL
            other.consume_tokens(self._token_ids[:1])
            return other.get_error() or reason
        return reason

    def _grammar_error(self) -> QuireError | None:
        if not self._matcher.is_error():
            return None
        reason = self._reason()
        if _NOT_ALLOWED in reason or _NO_TOKEN in reason:
            return InternalError(f"the output left its constraint: {reason.partition(_TAIL)[0]}", field="constraint")
        return refusal(self.kind, reason, "can't be followed any further")

    def _spend(self, tokens: int) -> QuireError | None:
        limits = self._limits
        self._seconds_left = min(limits.row_seconds, self._seconds_left + tokens * limits.token_seconds) - self.seconds
        if self._seconds_left >= 0:
            return None
        reason = f"its masks take longer than {limits.token_seconds * 1000:g} ms a token: make it less ambiguous"
        return refusal(self.kind, reason, "can't be followed any further")


def _allows(mask: npt.NDArray[np.int32], token_id: int) -> bool:
    return token_id >> 5 < len(mask) and bool(int(mask[token_id >> 5]) >> (token_id & 31) & 1)
