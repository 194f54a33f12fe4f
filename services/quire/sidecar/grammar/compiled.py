"""A compiled grammar, and the lexer that all sequences in it share."""

from __future__ import annotations

import threading
import time

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from quire.service.request import Constraint
from quire.sidecar.grammar.compile import compile_constraint


class CompiledGrammar:
    """A grammar that sequences may start with. Methods may be called from any thread.

    llguidance's lexer is built while it is used, is shared by all copies of a matcher, and stops for all of them when
    it has grown to its limit. So it is renewed then: sequences go on with a new lexer, by replay.

    `end_mask`, int32 [ceil(vocab_size / 32)], allows the `end_token_ids` and nothing else. `seconds` is how long it
    took from `begin`, in seconds of time.perf_counter.
    """

    def __init__(
        self, tokenizer: LLTokenizer, constraint: Constraint, num_bytes: int = 0, begin: float | None = None
    ) -> None:
        """Compiles, for as long as that takes; raises InvalidRequestError as compile_constraint does."""
        begin = time.perf_counter() if begin is None else begin
        self.constraint = constraint
        self.num_bytes = num_bytes
        self.end_token_ids = frozenset(tokenizer.eos_tokens)
        self.end_mask = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
        for token_id in self.end_token_ids:
            self.end_mask[token_id >> 5] |= np.uint32(1 << (token_id & 31))
        self.end_mask = self.end_mask.view(np.int32)
        self._tokenizer = tokenizer
        self._renewing = threading.Lock()
        self._lock = threading.Lock()
        self._generation = 0
        self._matcher = compile_constraint(tokenizer, constraint)
        self.seconds = time.perf_counter() - begin

    def start(self) -> tuple[LLMatcher, int]:
        """A matcher of an empty output, and the generation of its lexer."""
        with self._lock:
            return self._matcher.deep_copy(), self._generation

    def renew(self, generation: int) -> None:
        """Makes a new lexer, unless that of `generation` was replaced already."""
        with self._renewing:
            if generation != self._generation:
                return
            matcher = compile_constraint(self._tokenizer, self.constraint)
            # Sequences that start meanwhile need not wait for the compiler.
            with self._lock:
                self._matcher = matcher
                self._generation += 1
