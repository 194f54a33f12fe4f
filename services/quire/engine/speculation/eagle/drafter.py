"""Drafts from an EAGLE head on the CPU, for the slots of a batch. Called by the runner after each step's draws.

The head reads the tokens that the step computed and that are right, then goes on with its own. Its keys and values lie
in a few pages of each slot's own: it needs no more than the end of a text, since the target's hidden states carry the
rest. So it costs a prompt little, and may pause: after a gap it begins anew with what comes. It makes no second choices
to verify beside its drafts, as a GPU's does: there a row of a step costs next to nothing, here as much as it wins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.engine.models.model import ForwardBatch
from quire.engine.sequence import pages_for
from quire.engine.speculation.eagle.head import EagleHead
from quire.service.pages import PAGE_SIZE

Ints = npt.NDArray[np.int64]

# What the head sees of a text at most, and reads of a prompt: in tokens.
_CONTEXT = 1024
_PROMPT = 128


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step found out about S slots whose drafts are wanted."""

    slots: Ints  # [S]
    starts: Ints  # [S], the first position that the step computed
    counts: Ints  # [S], how many of them are right, from the first on
    rows: Ints  # [S], the step's row of the first
    wanted: Ints  # [S], how many drafts, at least 1


class EagleDrafter:
    """One head for a batch of `max_num_seqs` slots. `taps` are the hidden states that it needs of the target."""

    def __init__(self, head: EagleHead, max_num_seqs: int) -> None:
        self.taps = head.config.taps
        self.target_hidden_size = head.config.target_hidden_size
        self._head = head
        num_pages = _CONTEXT // PAGE_SIZE
        self._pages = head.new_kv_pages(max_num_seqs * num_pages)
        self._tables: Ints = np.arange(max_num_seqs * num_pages).reshape(max_num_seqs, num_pages)
        # How many tokens of its slot's text the head has read, and the position that comes after them.
        self._read: Ints = np.zeros(max_num_seqs, dtype=np.int64)
        self._next: Ints = np.full(max_num_seqs, -1)

    def admit(self, slot: int) -> None:
        """Another sequence takes over a slot."""
        self._next[slot] = -1

    def draft(self, progress: Progress, tapped: Tensor, token_ids: Ints) -> list[tuple[int, ...]]:
        """What may follow in each slot: the most likely tokens, one after another.

        `tapped` float32 [T, fused_size] are the hidden states of the step's rows; token_ids int64
        [slots, max_model_len + 1] the batch's, those drawn in this step included.
        """
        progress = self._make_room(progress)
        slots, counts = progress.slots, progress.counts
        items = np.repeat(np.arange(len(slots)), counts)
        behind = np.arange(len(items)) - np.repeat(np.cumsum(counts) - counts, counts)
        positions = progress.starts[items] + behind
        hidden = self._head.fuse(tapped[torch.from_numpy(progress.rows[items] + behind)])
        batch = self._batch(slots, counts, self._read[slots], token_ids[slots[items], positions + 1], positions)
        hidden, logits = self._head.forward(batch, hidden, self._pages)
        self._read[slots] += counts
        self._next[slots] = progress.starts + counts
        drafts = [[token] for token in self._best(logits)]
        hidden = hidden[batch.logit_rows]
        for place in range(1, int(progress.wanted.max())):
            going_on = np.flatnonzero(progress.wanted > place)
            chosen = slots[going_on]
            before = torch.from_numpy(np.flatnonzero(np.isin(self._live(progress, place - 1), going_on)))
            last = np.array([drafts[index][-1] for index in going_on.tolist()])
            positions = self._next[chosen] + place - 1
            batch = self._batch(chosen, np.ones_like(chosen), self._read[chosen] + place - 1, last, positions)
            hidden, logits = self._head.forward(batch, hidden[before], self._pages)
            for index, token in zip(going_on.tolist(), self._best(logits), strict=True):
                drafts[index].append(token)
        return [tuple(tokens) for tokens in drafts]

    def _live(self, progress: Progress, place: int) -> Ints:
        """The items that have a draft in `place`."""
        live: Ints = np.flatnonzero(progress.wanted > place)
        return live

    def _best(self, logits: Tensor) -> list[int]:
        best: list[int] = self._head.target_ids[logits.argmax(-1)].tolist()
        return best

    def _make_room(self, progress: Progress) -> Progress:
        """Begins anew after a gap and with a chunk of a prompt, and drops the oldest tokens where pages are full."""
        slots = progress.slots
        gap = (self._next[slots] != progress.starts) | (progress.counts > _PROMPT)
        self._read[slots[gap]] = 0
        unread = np.where(gap, np.maximum(progress.counts - _PROMPT, 0), 0)
        counts = progress.counts - unread
        for slot, count, wanted in zip(slots.tolist(), counts.tolist(), progress.wanted.tolist(), strict=True):
            if self._read[slot] + count + wanted > _CONTEXT:
                dropped = pages_for(_CONTEXT // 2)
                self._tables[slot] = np.roll(self._tables[slot], -dropped)
                self._read[slot] = max(0, self._read[slot] - dropped * PAGE_SIZE)
        return Progress(slots, progress.starts + unread, counts, progress.rows + unread, progress.wanted)

    def _batch(self, slots: Ints, counts: Ints, read: Ints, token_ids: Ints, positions: Ints) -> ForwardBatch:
        """`counts[i]` tokens of slot i, behind `read[i]` that the head has read; logits of the last of each."""
        query_start = np.zeros(len(slots) + 1, dtype=np.int64)
        np.cumsum(counts, out=query_start[1:])
        items = np.repeat(np.arange(len(slots)), counts)
        places = read[items] + np.arange(len(items)) - query_start[items]
        pages = self._tables[slots[items], places // PAGE_SIZE]
        context_lens = read + counts
        return ForwardBatch(
            token_ids=torch.from_numpy(token_ids),
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(pages * PAGE_SIZE + places % PAGE_SIZE),
            query_start=torch.from_numpy(query_start.astype(np.int32)),
            context_lens=torch.from_numpy(context_lens.astype(np.int32)),
            block_tables=torch.from_numpy(self._tables[slots].astype(np.int32)),
            logit_rows=torch.from_numpy(query_start[1:] - 1),
            max_query_len=int(counts.max()),
            max_context_len=int(context_lens.max()),
        )
