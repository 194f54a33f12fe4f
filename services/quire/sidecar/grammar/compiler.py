"""Constraints to compiled grammars: cached, tried elsewhere first, compiled off the event loop."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

from llguidance import LLTokenizer

from quire.service.request import Constraint
from quire.sidecar.config import CacheLimits, GrammarLimits
from quire.sidecar.grammar.compile import refusal
from quire.sidecar.grammar.compiled import CompiledGrammar
from quire.sidecar.grammar.memory import resident_bytes
from quire.sidecar.grammar.trials import Trials


class GrammarCompiler:
    """The cache of compiled grammars, by tenant and hash; the least recently used go first. One event loop's.

    `num_bytes` is what their compiling took. Grammars grow while they are used, which nothing reports: what the whole
    process has grown by counts too.
    """

    def __init__(self, tokenizer: LLTokenizer, trials: Trials, limits: GrammarLimits, cache: CacheLimits) -> None:
        self._tokenizer = tokenizer
        self._trials = trials
        self._limits = limits
        self._bounds = cache
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="compile")
        self._cache: OrderedDict[bytes, CompiledGrammar] = OrderedDict()
        self._running: dict[bytes, asyncio.Task[CompiledGrammar]] = {}
        self._resident_at_start = resident_bytes()
        self.num_bytes = 0
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._cache)

    def cached(self, constraint: Constraint, tenant: str) -> CompiledGrammar | None:
        """The compiled grammar, if it is in the cache."""
        return self._find(_key(constraint, tenant))

    async def compile(self, constraint: Constraint, tenant: str, patience_s: float | None = None) -> CompiledGrammar:
        """The compiled grammar; those of one tenant who ask for the same one at the same time share the work.

        Raises InvalidRequestError if the constraint is wrong, not supported or exceeds the limits, and
        OverloadedError if so many others are being compiled that its turn does not come within `patience_s`, by
        default as long as a constraint may take.
        """
        key = _key(constraint, tenant)
        grammar = self._find(key)
        if grammar is not None:
            return grammar
        task = self._running.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(
                self._compile(key, constraint, patience_s or self._limits.compile_seconds)
            )
            self._running[key] = task
            task.add_done_callback(lambda task: self._done(key, task))
        # One who gives up must not take it away from the others.
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Drops everything that is being compiled."""
        for task in list(self._running.values()):
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        self._threads.shutdown(cancel_futures=True)

    def _find(self, key: bytes) -> CompiledGrammar | None:
        grammar = self._cache.get(key)
        if grammar is not None:
            self._cache.move_to_end(key)
        return grammar

    async def _compile(self, key: bytes, constraint: Constraint, patience_s: float) -> CompiledGrammar:
        begin = time.perf_counter()
        size = len(constraint.source.encode())
        if size > self._limits.source_bytes:
            raise refusal(constraint.kind, f"it has {size} bytes and the limit is {self._limits.source_bytes}")
        num_bytes = size + await self._trials.run(constraint, patience_s)
        loop = asyncio.get_running_loop()
        grammar = await loop.run_in_executor(
            self._threads, CompiledGrammar, self._tokenizer, constraint, num_bytes, begin
        )
        self._insert(key, grammar)
        return grammar

    def _done(self, key: bytes, task: asyncio.Task[CompiledGrammar]) -> None:
        del self._running[key]
        # Those who asked hear of an error. If all of them have gone, it is of no more interest.
        if not task.cancelled():
            task.exception()

    def _insert(self, key: bytes, grammar: CompiledGrammar) -> None:
        self._cache[key] = grammar
        self.num_bytes += grammar.num_bytes
        # The newest stays, whatever its size: its request is about to ask for it.
        while len(self._cache) > 1 and self._is_full():
            _, evicted = self._cache.popitem(last=False)
            self.num_bytes -= evicted.num_bytes
            self.num_evicted += 1

    def _is_full(self) -> bool:
        grown = resident_bytes() - self._resident_at_start
        return len(self._cache) > self._bounds.entries or max(self.num_bytes, grown) > self._bounds.mib << 20


def _key(constraint: Constraint, tenant: str) -> bytes:
    """The name of a tenant's constraint: lengths keep its parts apart."""
    parts = (tenant.encode(), constraint.kind.value.encode(), constraint.source.encode())
    digest = blake2b(digest_size=32)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()
