"""Token masks in process. Grammar packages are loaded when the first constraint comes, and need not be there before."""

from __future__ import annotations

from collections.abc import Sequence

from quire.engine.masks import MaskRequest, MaskSource, MaskTicket
from quire.llm.structured_outputs import missing_package
from quire.service.checkpoint import TextModel
from quire.service.errors import InternalError
from quire.service.request import Constraint


class LazyMasks:
    """The core's MaskSource: see quire.engine.masks."""

    def __init__(self, text: TextModel) -> None:
        self._text = text
        self._source: MaskSource | None = None

    def compile(self, constraint: Constraint) -> None:
        """Must come before a request with `constraint`.

        Raises InvalidRequestError if it is wrong, ConfigError if a grammar package is missing.
        """
        try:
            from quire.llm.grammar_masks import GrammarMasks
        except ModuleNotFoundError as error:
            raise missing_package(error) from error
        if not isinstance(self._source, GrammarMasks):
            self._source = GrammarMasks(self._text)
        self._source.compile(constraint)

    def begin(self, requests: Sequence[MaskRequest], released: Sequence[int]) -> MaskTicket:
        """Starts to fill row i for `requests[i]` and returns at once; `released` sequences have ended."""
        if self._source is None:
            raise InternalError("masks are asked for before a constraint was compiled")
        return self._source.begin(requests, released)

    def close(self) -> None:
        """Lets go of everything."""
        if self._source is not None:
            self._source.close()
            self._source = None
