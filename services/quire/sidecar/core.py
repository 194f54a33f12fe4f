"""The sidecar's core: grammars compiled once, sequences' places in them, masks for a batch.

Knows neither gRPC nor protobuf. `server` calls it for engines. All calls come from one event loop; compiling and
filling run in threads beside it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from llguidance import LLTokenizer

from quire.service.checkpoint import Checkpoint, TextModel, load_text, locate
from quire.service.errors import InternalError, InvalidRequestError, QuireError
from quire.service.request import Constraint
from quire.sidecar.config import SidecarConfig
from quire.sidecar.grammar.compile import build_tokenizer
from quire.sidecar.grammar.compiler import CompiledGrammar, GrammarCompiler
from quire.sidecar.grammar.fill import MaskFiller, MaskRow
from quire.sidecar.grammar.masks import map_masks
from quire.sidecar.grammar.matcher import SequenceMatcher
from quire.sidecar.grammar.trials import Trials
from quire.sidecar.metrics import SidecarMetrics


@dataclass(frozen=True, slots=True)
class RowRequest:
    """The mask of a sequence's next token, into `row`.

    `constraint` comes with a sequence's first row on its stream, `accepted` are its output tokens since the last row.
    """

    sequence: int
    row: int
    constraint: Constraint | None
    accepted: list[int]


class GrammarCore:
    """One model's tokenizer, its compiled grammars, and the threads that fill masks."""

    def __init__(
        self, compiler: GrammarCompiler, trials: Trials, vocab_size: int, mask_threads: int, metrics: SidecarMetrics
    ) -> None:
        self.vocab_size = vocab_size
        self.metrics = metrics
        self.filler = MaskFiller(mask_threads)
        self._compiler = compiler
        self._trials = trials

    @classmethod
    async def load(cls, config: SidecarConfig, metrics: SidecarMetrics) -> GrammarCore:
        """Reads the model's tokenizer; raises ModelError if there is none."""
        checkpoint = await asyncio.to_thread(locate, config.model, text_only=True)
        trials = Trials(checkpoint.path, config.limits, config.compile_workers)
        try:
            (text, tokenizer), _ = await asyncio.gather(asyncio.to_thread(_read, checkpoint), trials.start())
        except BaseException:
            await trials.close()
            raise
        compiler = GrammarCompiler(tokenizer, trials, config.limits, config.cache_mib << 20)
        return cls(compiler, trials, text.vocab_size, config.mask_threads, metrics)

    async def compile(self, constraint: Constraint) -> tuple[CompiledGrammar, bool]:
        """The compiled grammar and whether it was there before. Raises what GrammarCompiler.compile raises."""
        kind = constraint.kind.value
        grammar = self._compiler.cached(constraint)
        if grammar is not None:
            self.metrics.compiles.labels(kind, "cached").inc()
            return grammar, True
        try:
            grammar = await self._compiler.compile(constraint)
        except QuireError as error:
            result = "refused" if isinstance(error, InvalidRequestError) else "failed"
            self.metrics.compiles.labels(kind, result).inc()
            raise
        self.metrics.compiles.labels(kind, "compiled").inc()
        self.metrics.compile_seconds.observe(grammar.seconds)
        self.metrics.cache_bytes.set(self._compiler.num_bytes)
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
        """Ends what is being compiled and the trial processes."""
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

    async def fill(self, rows: Sequence[RowRequest], released: Sequence[int]) -> dict[int, QuireError]:
        """Drops `released`, then fills `rows`. Returns the errors of those that have no mask; their states are gone.

        Raises InvalidRequestError if the rows themselves are wrong. Not to be called again before it has returned.
        """
        self._check(rows)
        for sequence in released:
            self._drop(sequence)
        errors = await self._start(rows)
        work = [
            MaskRow(row.sequence, row.row, self._sequences[row.sequence], row.accepted)
            for row in rows
            if row.sequence not in errors
        ]
        errors |= await asyncio.get_running_loop().run_in_executor(self._thread, self._fill, work)
        for sequence in errors:
            self._drop(sequence)
        self._core.metrics.row_errors.inc(len(errors))
        return errors

    def close(self) -> None:
        """Forgets all sequences; the memory is unmapped when a fill that still runs has ended."""
        self._core.metrics.streams.dec()
        self._core.metrics.sequences.dec(len(self._sequences))
        self._sequences.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _check(self, rows: Sequence[RowRequest]) -> None:
        count = len(self._bitmask)
        wrong = next((row.row for row in rows if row.row >= count), None)
        if wrong is not None:
            raise InvalidRequestError(f"rows.row is {wrong} and the file has {count} rows", field="fill.rows.row")
        for name, values in (("row", {row.row for row in rows}), ("sequence", {row.sequence for row in rows})):
            if len(values) < len(rows):
                raise InvalidRequestError(f"a rows.{name} stands twice in one step", field=f"fill.rows.{name}")

    async def _start(self, rows: Sequence[RowRequest]) -> dict[int, QuireError]:
        """Makes the states of sequences that are new, compiling what is not in the cache; returns their errors."""
        errors: dict[int, QuireError] = {}
        new = [row for row in rows if row.constraint is not None]
        grammars = await asyncio.gather(
            *(self._core.compile(row.constraint) for row in new if row.constraint is not None), return_exceptions=True
        )
        for row, result in zip(new, grammars, strict=True):
            if isinstance(result, QuireError):
                errors[row.sequence] = result
            elif isinstance(result, BaseException):
                raise result
            else:
                self._drop(row.sequence)
                self._sequences[row.sequence] = SequenceMatcher(result[0])
                self._core.metrics.sequences.inc()
        for row in rows:
            if row.sequence not in self._sequences and row.sequence not in errors:
                errors[row.sequence] = InternalError(
                    f"sequence {row.sequence} is unknown on this stream: its first row must carry its constraint"
                )
        return errors

    def _fill(self, work: Sequence[MaskRow]) -> dict[int, QuireError]:
        begin = time.perf_counter()
        errors = self._core.filler.fill(work, self._bitmask)
        self._core.metrics.rows.inc(len(work))
        self._core.metrics.fill_seconds.observe(time.perf_counter() - begin)
        return errors

    def _drop(self, sequence: int) -> None:
        if self._sequences.pop(sequence, None) is not None:
            self._core.metrics.sequences.dec()
