"""A model and a head that look two tokens back, so that what they should answer can be computed: on a GPU's runner.

The model reads the token before a row's from its pages, as attention would, so what lies there counts.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from triton_testing import DEVICE

from quire.engine.models.gpu_decoder import GpuKVCache, GpuStep
from quire.engine.models.model import HiddenTaps
from quire.kernels.step_inputs import StepInputs, StepSource
from quire.service.pages import PAGE_SIZE


class MarkovModel:
    """What the runner needs of `quire.engine.models.gpu_decoder.GpuDecoder`. `table` float [V, V, V]: logits of the
    next token by the last two. A token's hidden state are the token before it and it."""

    def __init__(self, table: Tensor) -> None:
        self.table = table.to(DEVICE)
        self.device, self.dtype, self.group = torch.device(DEVICE), torch.float32, None
        self.config = SimpleNamespace(vocab_size=len(table), hidden_size=2, num_heads=1, num_kv_heads=1, head_size=1)

    def new_kv_cache(self, num_pages: int) -> GpuKVCache:
        keys, values = (torch.full((num_pages, 1, PAGE_SIZE, 1), torch.nan, device=DEVICE) for _ in range(2))
        return GpuKVCache((keys,), (values,))

    def forward(self, step: GpuStep, cache: GpuKVCache, taps: HiddenTaps | None = None) -> Tensor:
        (keys,) = cache.keys
        there = step.slot_mapping >= 0
        keys.view(-1)[step.slot_mapping[there]] = step.token_ids[there].float()
        row = torch.arange(len(step.token_ids), dtype=torch.int32, device=DEVICE)
        sequence = torch.searchsorted(step.query_start[1:].contiguous(), row, right=True)
        slots = step.table_rows[sequence.clamp_max(len(step.table_rows) - 1)].to(torch.int64)
        place = (step.positions - 1).clamp_min(0).to(torch.int64)
        pages = step.block_tables[slots, place // PAGE_SIZE].to(torch.int64)
        before = torch.where(step.positions > 0, keys[pages, 0, place % PAGE_SIZE, 0], 0.0)
        hidden = torch.stack((before, step.token_ids.float()), 1)
        if taps is not None:
            taps.hidden.copy_(hidden)
        return hidden if step.logit_rows is None else hidden[step.logit_rows]

    def logits(self, hidden: Tensor) -> Tensor:
        before, token = hidden.nan_to_num().to(torch.int64).unbind(1)
        return self.table[before, token].clone()


class MarkovHead:
    """What the runner needs of `quire.engine.gpu.eagle.GpuEagle`: it drafts what its own `table` finds most likely."""

    def __init__(self, model: MarkovModel, table: Tensor) -> None:
        self._model, self._table = model, table.to(DEVICE)
        self.device, self.dtype, self.config = model.device, model.dtype, SimpleNamespace(hidden_size=2)
        self.target_ids = None

    def new_kv_cache(self, num_pages: int) -> GpuKVCache:
        return self._model.new_kv_cache(num_pages + 1)

    def new_taps(self, num_tokens: int) -> HiddenTaps:
        return HiddenTaps.new((0,), num_tokens, 2, self.dtype, self.device)

    def write(self, source: StepSource, rows: StepInputs, tapped: Tensor, fused: Tensor, cache: GpuKVCache) -> None:
        """It remembers nothing in its pages."""
        fused.copy_(tapped)

    def forward(self, step: GpuStep, hidden: Tensor, cache: GpuKVCache, skipped: Tensor) -> Tensor:
        hidden.copy_(torch.stack((hidden[:, 1], step.token_ids.float()), 1))
        before, token = hidden.nan_to_num().to(torch.int64).unbind(1)
        return self._table[before, token]
