"""A model run without an engine: given tokens in, the logits of every one of them out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from quire.engine.models.model import ForwardBatch, Model
from quire.engine.sequence import pages_for
from quire.service.pages import PAGE_SIZE


@torch.inference_mode()
def teacher_forced_logits(model: Model, sequences: Sequence[Sequence[int]], chunk: int) -> list[Tensor]:
    """Each sequence's logits, float32 [its length, vocab_size]; a step computes the next `chunk` tokens of all."""
    num_pages = max(pages_for(len(sequence)) for sequence in sequences)
    tables = torch.arange(len(sequences) * num_pages, dtype=torch.int32).view(len(sequences), num_pages)
    cache = model.new_kv_cache(tables.numel())
    found: list[list[Tensor]] = [[] for _ in sequences]
    for start in range(0, max(map(len, sequences)), chunk):
        alive = [index for index, sequence in enumerate(sequences) if start < len(sequence)]
        parts = [list(sequences[index][start : start + chunk]) for index in alive]
        counts = torch.tensor([len(part) for part in parts])
        positions = torch.cat([torch.arange(start, start + len(part)) for part in parts])
        pages = tables[alive].repeat_interleave(counts, dim=0)[torch.arange(len(positions)), positions // PAGE_SIZE]
        context_lens = start + counts
        batch = ForwardBatch(
            token_ids=torch.tensor(list(chain.from_iterable(parts))),
            positions=positions,
            slot_mapping=pages.to(torch.int64) * PAGE_SIZE + positions % PAGE_SIZE,
            query_start=torch.cat((torch.zeros(1), counts.cumsum(0))).to(torch.int32),
            context_lens=context_lens.to(torch.int32),
            block_tables=tables[alive, : pages_for(int(context_lens.max()))],
            logit_rows=torch.arange(len(positions)),
            max_query_len=int(counts.max()),
            max_context_len=int(context_lens.max()),
        )
        for index, part in zip(alive, model.forward(batch, cache).split(counts.tolist()), strict=True):
            found[index].append(part)
    return [torch.cat(parts) for parts in found]
