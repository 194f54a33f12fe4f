"""Constraints to compiled grammars: cached, tried elsewhere first, compiled off the event loop."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from llguidance import LLMatcher, LLTokenizer

from quire.service.request import Constraint
from quire.sidecar.config import GrammarLimits
from quire.sidecar.grammar.compile import compile_constraint, refusal
from quire.sidecar.grammar.trials import Trials


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar that sequences may start with. `matcher` is at the beginning and must only be copied."""

    constraint: Constraint
    matcher: LLMatcher
    num_bytes: int
    seconds: float


class GrammarCompiler:
    """The cache of compiled grammars, by what was asked; the least recently used go first. One event loop's."""

    def __init__(self, tokenizer: LLTokenizer, trials: Trials, limits: GrammarLimits, cache_bytes: int) -> None:
        self._tokenizer = tokenizer
        self._trials = trials
        self._limits = limits
        self._capacity = cache_bytes
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="compile")
        self._cache: OrderedDict[Constraint, CompiledGrammar] = OrderedDict()
        self._running: dict[Constraint, asyncio.Task[CompiledGrammar]] = {}
        self.num_bytes = 0

    def cached(self, constraint: Constraint) -> CompiledGrammar | None:
        """The compiled grammar, if it is in the cache."""
        grammar = self._cache.get(constraint)
        if grammar is not None:
            self._cache.move_to_end(constraint)
        return grammar

    async def compile(self, constraint: Constraint) -> CompiledGrammar:
        """The compiled grammar; those who ask for the same one at the same time share the work.

        Raises InvalidRequestError if the constraint is wrong, not supported or exceeds the limits, and
        OverloadedError if too many others are being compiled.
        """
        grammar = self.cached(constraint)
        if grammar is not None:
            return grammar
        task = self._running.get(constraint)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._compile(constraint))
            self._running[constraint] = task
            task.add_done_callback(lambda task: self._done(constraint, task))
        # One who gives up must not take it away from the others.
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Drops everything that is being compiled."""
        for task in list(self._running.values()):
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        self._threads.shutdown(cancel_futures=True)

    async def _compile(self, constraint: Constraint) -> CompiledGrammar:
        begin = time.perf_counter()
        size = len(constraint.source.encode())
        if size > self._limits.source_bytes:
            raise refusal(constraint.kind, f"it has {size} bytes and the limit is {self._limits.source_bytes}")
        num_bytes = size + await self._trials.run(constraint)
        loop = asyncio.get_running_loop()
        matcher = await loop.run_in_executor(self._threads, compile_constraint, self._tokenizer, constraint)
        grammar = CompiledGrammar(constraint, matcher, num_bytes, time.perf_counter() - begin)
        self._insert(grammar)
        return grammar

    def _done(self, constraint: Constraint, task: asyncio.Task[CompiledGrammar]) -> None:
        del self._running[constraint]
        # Those who asked hear of an error. If all of them have gone, it is of no more interest.
        if not task.cancelled():
            task.exception()

    def _insert(self, grammar: CompiledGrammar) -> None:
        self._cache[grammar.constraint] = grammar
        self.num_bytes += grammar.num_bytes
        # The newest stays, whatever its size: its request is about to ask for it.
        while self.num_bytes > self._capacity and len(self._cache) > 1:
            _, evicted = self._cache.popitem(last=False)
            self.num_bytes -= evicted.num_bytes
