"""A compiled grammar, and the lexers that its sequences share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from weakref import WeakSet

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from quire.service.request import Constraint
from quire.sidecar.grammar.compile import compile_constraint
from quire.sidecar.grammar.cores import num_cores

# A grammar has up to so many lexers for each core, or as many as there are cores: of a few slow masks two in one lexer
# are what a step waits for, and many cores get into each other's way more often. It has one if to make it takes longer
# than this, in seconds of CPU time; the first is made with cold caches.
_LEXERS_A_CORE, _QUICK_S, _FIRST_S = 4, 0.02, 0.1


class Lexer:
    """One lexer and the `sequences` in it. Methods may be called from any thread.

    llguidance's lexer is built while it is used, is shared by all copies of a matcher, and stops for all of them when
    it has grown to its limit. So it is renewed then: sequences go on with a new lexer, by replay.
    """

    def __init__(self, make: Callable[[], LLMatcher], matcher: LLMatcher | None = None) -> None:
        self.sequences: WeakSet[object] = WeakSet()
        self._make = make
        self._making = threading.Lock()
        self._lock = threading.Lock()
        self._generation = 0
        self._matcher = matcher

    def start(self) -> tuple[LLMatcher, int]:
        """A matcher of an empty output, and its generation. The first one may have to be compiled."""
        if self._matcher is None:
            with self._making:
                if self._matcher is None:
                    self._matcher = self._make()
        with self._lock:
            return self._matcher.deep_copy(), self._generation

    def renew(self, generation: int) -> None:
        """Starts over, unless that was done since `generation`."""
        with self._making:
            if generation != self._generation:
                return
            matcher = self._make()
            # Sequences that start meanwhile need not wait for the compiler.
            with self._lock:
                self._matcher = matcher
                self._generation += 1


class CompiledGrammar:
    """A grammar that sequences may start with. Methods may be called from any thread.

    With a lexer llguidance computes one mask at a time: a grammar of several sequences has several lexers.

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
        self._compile = partial(compile_constraint, tokenizer, constraint)
        self._lock = threading.Lock()
        self._most_lexers = most_lexers(num_cores())
        self._lexers = [Lexer(self._make, self._make(_FIRST_S))]
        self.seconds = time.perf_counter() - begin

    def _make(self, most: float = _QUICK_S) -> LLMatcher:
        """Compiles once more; if that takes longer than `most`, there will be no further lexers."""
        began = time.thread_time()
        matcher = self._compile()
        if time.thread_time() - began > most:
            self._most_lexers = 1
        return matcher

    def join(self, sequence: object) -> Lexer:
        """The lexer for a new sequence, which counts as one of its own for as long as it lives."""
        with self._lock:
            lexer = min(self._lexers, key=lambda lexer: len(lexer.sequences))
            if lexer.sequences and len(self._lexers) < self._most_lexers:
                lexer = Lexer(self._make)
                self._lexers.append(lexer)
            lexer.sequences.add(sequence)
            return lexer


def most_lexers(num_cores: int) -> int:
    """Of one grammar, beside so many cores."""
    return max(_LEXERS_A_CORE, num_cores) * num_cores
