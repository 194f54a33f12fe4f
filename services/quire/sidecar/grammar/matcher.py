"""One sequence's place in its grammar."""

from __future__ import annotations

from llguidance import LLMatcher

from quire.service.errors import InternalError, QuireError
from quire.sidecar.grammar.compile import refusal
from quire.sidecar.grammar.compiler import CompiledGrammar

# llguidance tells these from limits that were exceeded only in its words.
_WRONG_TOKEN = ("doesn't satisfy the grammar", "out of range")
_TAIL = "\n<non-verbose/>"


class SequenceMatcher:
    """A sequence's grammar and how far its output got in it; not to be used from two threads at once."""

    def __init__(self, grammar: CompiledGrammar) -> None:
        self._kind = grammar.constraint.kind
        self.matcher: LLMatcher = grammar.matcher.deep_copy()

    def consume(self, token_ids: list[int]) -> None:
        """Advances by output tokens; one that is not allowed leaves the matcher in error."""
        if token_ids:
            self.matcher.consume_tokens(token_ids)

    @property
    def error(self) -> QuireError | None:
        """Why there will be no more masks, if so: the grammar became too complex, or a token was not allowed."""
        if not self.matcher.is_error():
            return None
        reason = self.matcher.get_error()
        if any(words in reason for words in _WRONG_TOKEN):
            return InternalError(f"the output left its constraint: {reason.partition(_TAIL)[0]}", field="constraint")
        return refusal(self._kind, reason)
