"""What a runner and a model say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from quire.engine.models.config import ModelConfig


class ModelDtype(Enum):
    """How exactly a model computes.

    FLOAT32: every product in float32, the reference of every equality test. BFLOAT16: bfloat16 activations over the
    checkpoint's own weights, 4-bit ones included; the residual stream and norms stay in float32.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's tokens, flat: T tokens of S sequences, N of which want logits. All of it is on the model's device."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], each token's index in its sequence
    slot_mapping: Tensor  # int64 [T], page × PAGE_SIZE + offset: where the token's key and value go
    query_start: Tensor  # int32 [S + 1], offsets into T
    context_lens: Tensor  # int32 [S], tokens with keys and values once this step's are written
    block_tables: Tensor  # int32 [S, P], page numbers; entries past a sequence's length are arbitrary but valid
    logit_rows: Tensor  # int64 [N], indexes into T
    max_query_len: int
    max_context_len: int


@dataclass(frozen=True, slots=True)
class KVCache:
    """The pool of pages on the device."""

    pages: tuple[Tensor, ...]  # per layer: [pages, 2 × kv_heads, PAGE_SIZE, head_size], first keys, then values


@dataclass(frozen=True, slots=True)
class HiddenTaps:
    """Hidden states that a drafter wants of all of a step's rows, filled by `Model.forward`.

    `layers` are those whose input, the residual stream, is kept; the number of layers stands for what comes out of the
    last one, normalized.
    """

    layers: tuple[int, ...]
    hidden: Tensor  # [T, len(layers) × hidden_size], side by side in the order of `layers`

    @classmethod
    def new(
        cls,
        layers: tuple[int, ...],
        num_tokens: int,
        hidden_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> HiddenTaps:
        """For a step of `num_tokens`, of the residual stream's type."""
        return cls(layers, torch.empty(num_tokens, len(layers) * hidden_size, dtype=dtype, device=device))

    def keep(self, layer: int, hidden: Tensor) -> None:
        """Copies hidden [T, hidden_size], the input of `layer`, if it is wanted."""
        for index, wanted in enumerate(self.layers):
            if wanted == layer:
                self._part(index).copy_(hidden)

    def place(self, layer: int) -> Tensor | None:
        """Where the input of `layer` is to be, for whoever makes it: [T, hidden_size], rows strided. None if it is not
        wanted, or in two places: then `keep` has it."""
        return self._part(self.layers.index(layer)) if self.layers.count(layer) == 1 else None

    def _part(self, index: int) -> Tensor:
        size = self.hidden.shape[1] // len(self.layers)
        return self.hidden[:, index * size : (index + 1) * size]


class Model(Protocol):
    """A decoder whose weights are loaded."""

    config: ModelConfig
    kv_page_bytes: int  # memory of one page: keys and values of all layers

    def new_kv_cache(self, num_pages: int) -> KVCache:
        """A pool of `num_pages` pages in this model's KV dtype; raises ModelError if memory does not suffice."""

    def forward(self, batch: ForwardBatch, cache: KVCache, taps: HiddenTaps | None = None) -> Tensor:
        """Logits, float32 [N, vocab_size], of the rows asked for; writes the batch's keys and values into `cache`, and
        what `taps` asks for into it."""
