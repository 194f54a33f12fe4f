"""The sidecar's core: grammars compiled once, sequences' places in them, masks for a batch.

Knows neither gRPC nor protobuf. `server` calls it for engines. All calls come from one event loop; compiling and
filling run in threads beside it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from llguidance import LLTokenizer

from quire.service.checkpoint import Checkpoint, TextModel, load_text, locate
from quire.service.errors import InternalError, InvalidRequestError, QuireError
from quire.service.request import Constraint
from quire.sidecar.config import SidecarConfig
from quire.sidecar.grammar.batch import Filled, MaskRow
from quire.sidecar.grammar.compile import build_tokenizer
from quire.sidecar.grammar.compiled import CompiledGrammar
from quire.sidecar.grammar.compiler import GrammarCompiler
from quire.sidecar.grammar.fill import MaskFiller
from quire.sidecar.grammar.masks import map_masks
from quire.sidecar.grammar.matcher import SequenceMatcher
from quire.sidecar.grammar.trials import Trials
from quire.sidecar.metrics import SidecarMetrics

# After a restart all of an engine's grammars come at once, of requests that are half done.
_REPLAY_PATIENCE_S = 60.0


class RowRequest(NamedTuple):
    """The mask of a sequence's next token, into `row`.

    `constraint` and the `tenant` whose it is come with a sequence's first row on its stream; for the rest see
    quire.sidecar.grammar.batch.MaskRow.
    """

    sequence: int
    row: int
    accepted: Sequence[int]
    drafts: Sequence[int] = ()
    max_forced: int = 0
    constraint: Constraint | None = None
    tenant: str = ""


class GrammarCore:
    """One model's tokenizer, its compiled grammars, and the threads that fill masks."""

    def __init__(
        self,
        compiler: GrammarCompiler,
        trials: Trials,
        vocab_size: int,
        filler: MaskFiller,
        metrics: SidecarMetrics,
    ) -> None:
        self.vocab_size = vocab_size
        self.metrics = metrics
        self.filler = filler
        self._compiler = compiler
        self._trials = trials

    @classmethod
    async def load(cls, config: SidecarConfig, metrics: SidecarMetrics) -> GrammarCore:
        """Reads the model's tokenizer; raises ModelError if there is none."""
        checkpoint = await asyncio.to_thread(locate, config.model, text_only=True)
        trials = Trials(checkpoint.path, config.limits, config.compile_workers, metrics.compile_timeouts.inc)
        try:
            (text, tokenizer), _ = await asyncio.gather(asyncio.to_thread(_read, checkpoint), trials.start())
        except BaseException:
            await trials.close()
            raise
        compiler = GrammarCompiler(tokenizer, trials, config.limits, config.cache)
        filler = MaskFiller(config.mask_threads, config.masks)
        return cls(compiler, trials, text.vocab_size, filler, metrics)

    async def compile(
        self, constraint: Constraint, tenant: str, patience_s: float | None = None
    ) -> tuple[CompiledGrammar, bool]:
        """The compiled grammar and whether it was there before. Raises what GrammarCompiler.compile raises."""
        kind = constraint.kind.value
        grammar = self._compiler.cached(constraint, tenant)
        if grammar is not None:
            self.metrics.compiles.labels(kind, "cached").inc()
            return grammar, True
        try:
            grammar = await self._compiler.compile(constraint, tenant, patience_s)
        except QuireError as error:
            result = "refused" if isinstance(error, InvalidRequestError) else "failed"
            self.metrics.compiles.labels(kind, result).inc()
            raise
        self.metrics.compiles.labels(kind, "compiled").inc()
        self.metrics.compile_seconds.observe(grammar.seconds)
        self.metrics.cache_bytes.set(self._compiler.num_bytes)
        self.metrics.cache_entries.set(len(self._compiler))
        return grammar, False

    def open(self, path: str, rows: int, vocab_size: int) -> MaskStream:
        """An engine core's stream, which fills rows of the file at `path`. Raises InvalidRequestError."""
        if vocab_size != self.vocab_size:
            raise InvalidRequestError(
                f"open.vocab_size is {vocab_size} and the sidecar's model has {self.vocab_size}: "
                "start both with the same --model",
                field="open.vocab_size",
            )
        return MaskStream(self, map_masks(path, rows, vocab_size))

    async def close(self) -> None:
        """Ends what is being compiled, the trial processes and the threads that fill."""
        self.filler.close()
        await self._compiler.close()
        await self._trials.close()


def _read(checkpoint: Checkpoint) -> tuple[TextModel, LLTokenizer]:
    text = load_text(checkpoint)
    return text, build_tokenizer(text)


class MaskStream:
    """One engine core's sequences and the rows that they share with it."""

    def __init__(self, core: GrammarCore, bitmask: npt.NDArray[np.int32]) -> None:
        self._core = core
        self._bitmask = bitmask
        self._sequences: dict[int, SequenceMatcher] = {}
        # Fills of one stream follow one another; another stream's do not wait for them.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fill")
        core.metrics.streams.inc()

    async def fill(self, rows: Sequence[RowRequest], released: Sequence[int]) -> Filled:
        """Drops `released`, then fills `rows`. The states of those that have no mask are gone.

        Raises InvalidRequestError if the rows themselves are wrong. Not to be called again before it has returned.
        """
        self._check(rows)
        for sequence in released:
            self._drop(sequence)
        errors = await self._start(rows)
        matchers = self._sequences
        work = [
            MaskRow(sequence, row, matchers[sequence], accepted, drafts, max_forced)
            for sequence, row, accepted, drafts, max_forced, _, _ in rows
            if sequence not in errors
        ]
        filled = await asyncio.get_running_loop().run_in_executor(self._thread, self._fill, work)
        filled.errors.update(errors)
        for sequence in filled.errors:
            self._drop(sequence)
        self._core.metrics.row_errors.inc(len(filled.errors))
        return filled

    def close(self) -> None:
        """Forgets all sequences; the memory is unmapped when a fill that still runs has ended."""
        self._core.metrics.streams.dec()
        self._core.metrics.sequences.dec(len(self._sequences))
        self._sequences.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _check(self, rows: Sequence[RowRequest]) -> None:
        count, end = len(self._bitmask), 0
        for first, num_drafts in sorted((row, len(drafts)) for _, row, _, drafts, *_ in rows):
            if first < end:
                raise InvalidRequestError(
                    f"rows.row is {first}, which another sequence of the step fills", field="fill.rows.row"
                )
            end = first + 1 + num_drafts
        if end > count:
            raise InvalidRequestError(f"rows reach to row {end - 1} and the file has {count} rows", field="fill.rows")
        if len({row.sequence for row in rows}) < len(rows):
            raise InvalidRequestError("a rows.sequence stands twice in one step", field="fill.rows.sequence")

    async def _start(self, rows: Sequence[RowRequest]) -> dict[int, QuireError]:
        """Makes the states of sequences that are new, compiling what is not in the cache; returns their errors."""
        errors: dict[int, QuireError] = {}
        new = [(row, row.constraint) for row in rows if row.constraint is not None]
        if new:
            await self._compile(new, errors)
        for row in rows:
            if row.sequence not in self._sequences and row.sequence not in errors:
                errors[row.sequence] = InternalError(
                    f"sequence {row.sequence} is unknown on this stream: its first row must carry its constraint"
                )
        return errors

    async def _compile(self, new: Sequence[tuple[RowRequest, Constraint]], errors: dict[int, QuireError]) -> None:
        grammars = await asyncio.gather(
            *(self._core.compile(constraint, row.tenant, _REPLAY_PATIENCE_S) for row, constraint in new),
            return_exceptions=True,
        )
        for (row, _), result in zip(new, grammars, strict=True):
            if isinstance(result, QuireError):
                errors[row.sequence] = result
            elif isinstance(result, BaseException):
                raise result
            else:
                self._drop(row.sequence)
                self._sequences[row.sequence] = SequenceMatcher(result[0], self._core.filler.limits)
                self._core.metrics.sequences.inc()

    def _fill(self, work: Sequence[MaskRow]) -> Filled:
        begin = time.perf_counter()
        filled = self._core.filler.fill(work, self._bitmask)
        metrics = self._core.metrics
        metrics.rows.inc(len(work))
        metrics.fill_seconds.observe(time.perf_counter() - begin)
        metrics.slowest_row_seconds.observe(filled.seconds)
        metrics.late_rows.inc(filled.num_late)
        return filled

    def _drop(self, sequence: int) -> None:
        if self._sequences.pop(sequence, None) is not None:
            self._core.metrics.sequences.dec()
