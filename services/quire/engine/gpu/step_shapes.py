"""Which forward passes serve which steps: the graphs that `quire.engine.gpu.runner` captures, by their largest batch.

A step is padded to the smallest that holds it. What a pass's kernels launch follows from its shape alone, so one that
fits closely launches less for nothing: of sequences with prompts a step has few as a rule, and passes for few of them
go before those for as many as there may be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quire.engine.gpu.graphs import Sizes, batch_sizes, token_sizes
from quire.engine.gpu.staged_step import Layout
from quire.kernels.attention_worklist import AttentionLimits

# Larger steps take longer to run than to launch kernel by kernel, and are rarely of a size seen before.
_LARGEST_GRAPH = 2048
# Rows of the smallest passes that verify drafts: small models have kernels of their own for so few.
_FEW_ROWS = (2, 4, 8)
# Sequences with prompts. Attention launches a program for each KV head of each that there may be.
_FEW_CHUNKS = 16


@dataclass(frozen=True, slots=True)
class StepShape:
    """The largest step that a forward pass serves."""

    limits: AttentionLimits
    num_logits: int | None  # None: each row is drawn from
    grouped: bool = False  # sequences that share a long prefix have it read once
    trees: bool = False  # drafts may have siblings


class StepShapes:
    """Those of a runner for batches of up to `max_num_seqs`, and of up to `max_num_draws` rows that are drawn from.

    `verified`: up to how many rows of a sequence attention takes together, of steps without siblings and with some;
    `siblings`: whether there are such steps.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_num_draws: int,
        max_num_batched_tokens: int,
        verified: tuple[int, int] = (1, 1),
        *,
        siblings: bool = False,
    ) -> None:
        self.batch_sizes: Sizes = batch_sizes(max_num_seqs)
        self.token_sizes: Sizes = token_sizes(min(max_num_batched_tokens, _LARGEST_GRAPH))
        # Of steps that only draw: a few drafts of one sequence are not worth a pass for many rows.
        most = self.token_sizes(max_num_draws) or self.token_sizes.all[-1]
        self._verification_sizes = Sizes([size for size in (*_FEW_ROWS, *self.token_sizes.all) if size <= most])
        self._max_num_seqs, self._max_num_draws = max_num_seqs, max_num_draws
        self._verified, self._siblings = verified, siblings

    def captured(self, layout: Layout) -> StepShape | None:
        """The graph that serves a step; None if it is too large for any."""
        most, verified = int(layout.work.counts.max()), self._verified_in(layout)
        if layout.draws_only and most == 1 and (size := self.batch_sizes(len(layout.work))) is not None:
            return self._decodes(size, layout.grouped)
        if layout.draws_only and most <= verified and (size := self._verification_sizes(layout.num_tokens)) is not None:
            return self._verifications(size, verified, layout.grouped, layout.trees)
        size = self.token_sizes(layout.num_tokens)
        if size is None:
            return None
        few = int(np.count_nonzero(layout.work.counts > min(size, verified))) <= _FEW_CHUNKS
        return self._mixed(size, verified, layout.grouped, layout.trees, few=few)

    def exact(self, layout: Layout) -> StepShape:
        """What serves a step without padding."""
        most = int(layout.work.counts.max())
        verified = min(self._verified_in(layout), most)
        num_chunks = int(np.count_nonzero(layout.work.counts > verified))
        # All slots, so that kernels that look at all sequences are compiled once.
        limits = AttentionLimits(layout.num_tokens, self._max_num_seqs, most, verified, num_chunks)
        return StepShape(limits, len(layout.draws), layout.grouped, layout.trees)

    def largest(self, num_tokens: int) -> StepShape:
        """Of steps of up to so many tokens."""
        limits = AttentionLimits(num_tokens, min(num_tokens, self._max_num_seqs), num_tokens)
        return StepShape(limits, min(num_tokens, self._max_num_draws))

    def all(self) -> list[tuple[int, int, StepShape]]:
        """Those that steps without masks may want, but for groups with drafts, each with its rank, the lower the
        sooner it is wanted, and its size."""
        tokens = self.token_sizes.all
        ranked: list[tuple[int, int, StepShape]] = []
        for grouped, rank in ((False, 0), (True, 3)):
            ranked += [(rank, size, self._decodes(size, grouped)) for size in self.batch_sizes.all]
            for few in (True, False):
                ranked += [(rank + (0 if few else 2), size, self._mixed(size, 1, grouped, few=few)) for size in tokens]
        if self._max_num_draws > self._max_num_seqs:
            for trees in (False, True)[: 1 + self._siblings]:
                ranked += self._with_drafts(self._verified[trees], trees)
        return ranked

    def _with_drafts(self, count: int, trees: bool) -> list[tuple[int, int, StepShape]]:
        tokens = self.token_sizes.all
        mixed = [(2, size, self._mixed(size, count, False, trees)) for size in tokens]
        if count == 1:
            return mixed
        sizes = self._verification_sizes.all
        return mixed + [(1, size, self._verifications(size, count, False, trees)) for size in sizes]

    def _verified_in(self, layout: Layout) -> int:
        return self._verified[layout.trees] if layout.work.any_drafts else 1

    def _decodes(self, size: int, grouped: bool) -> StepShape:
        return StepShape(AttentionLimits(size, size, 1), None, grouped)

    def _verifications(self, size: int, verified: int, grouped: bool, trees: bool) -> StepShape:
        """Of steps in which all rows are drawn from, and no sequence has more than `verified` of them."""
        rows = min(size, verified)
        return StepShape(AttentionLimits(size, min(size, self._max_num_seqs), rows, rows), None, grouped, trees)

    def _mixed(self, size: int, verified: int, grouped: bool, trees: bool = False, *, few: bool = True) -> StepShape:
        num_seqs, rows = min(size, self._max_num_seqs), min(size, verified)
        # Where there can't be more than a few, that is one shape.
        num_chunks = min(num_seqs, size // (rows + 1), _FEW_CHUNKS if few else size)
        limits = AttentionLimits(size, num_seqs, size, rows, num_chunks)
        return StepShape(limits, min(size, self._max_num_draws), grouped, trees)
