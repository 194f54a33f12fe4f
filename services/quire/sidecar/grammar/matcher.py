"""One sequence's place in its grammar."""

from __future__ import annotations

from llguidance import LLMatcher

from quire.service.errors import InternalError, QuireError
from quire.sidecar.grammar.compile import refusal
from quire.sidecar.grammar.compiler import CompiledGrammar

_TOO_COMPLEX = ("ParserTooComplex", "LexerTooComplex")


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
        if self.matcher.stop_reason() in _TOO_COMPLEX:
            return refusal(self._kind, self.matcher.get_error())
        return InternalError(f"the output left its constraint: {self.matcher.get_error().strip()}", field="constraint")
