"""An EAGLE head on the CPU. Its keys and values lie in pages of their own under the target's page numbers.

Row p of a step pairs the token at position p + 1 with the target's hidden state of position p and predicts the token at
p + 2. Positions, slots and block tables are those of p: whatever moves, shares or frees the target's pages does the
same to the head's.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quire.engine.models.decoder import rotary_frequencies_table, zeroed_pages
from quire.engine.models.linear import LinearKernels
from quire.engine.models.memory import available_memory
from quire.engine.models.model import ForwardBatch, ModelDtype
from quire.engine.models.step import plan_step
from quire.engine.speculation.eagle.checkpoint import open_eagle
from quire.engine.speculation.eagle.config import EagleConfig
from quire.engine.speculation.eagle.parts import EagleParts, Target, load_parts
from quire.kernels.rms_norm import add_rms_norm, rms_norm
from quire.service.errors import InternalError
from quire.service.pages import PAGE_SIZE


def load_eagle(path: Path, target: Target, dtype: ModelDtype) -> EagleHead:
    """The head in the folder `path`, in either published layout, for `target`.

    Raises ModelError that names the setting or tensor at fault, and what to do.
    """
    checkpoint = open_eagle(path, target.config)
    config = checkpoint.config
    size, layer = config.hidden_size, config.layer
    attention = (layer.num_heads + layer.num_kv_heads) * layer.head_size * size * 3
    num_parameters = attention + 3 * size * layer.intermediate_size + size * config.draft_vocab_size
    kernels = LinearKernels.choose(dtype, num_parameters, available_memory())
    return EagleHead(load_parts(checkpoint, target, kernels), target, kernels)


class EagleHead:
    """A loaded head. `target_ids`, int64 [draft_vocab_size], are the target's tokens that it can draft."""

    def __init__(self, parts: EagleParts, target: Target, kernels: LinearKernels) -> None:
        config = parts.config
        self.config: EagleConfig = config
        ids = parts.target_ids
        self.target_ids = torch.arange(config.draft_vocab_size) if ids is None else ids
        self._parts = parts
        self._target = target
        self._kernels = kernels
        self._kv_dtype = kernels.large
        self._page_shape = (2 * config.layer.num_kv_heads, PAGE_SIZE, config.layer.head_size)
        self.kv_page_bytes = 2 * config.layer.num_kv_heads * PAGE_SIZE * config.layer.head_size * kernels.large.itemsize
        self._rotary = rotary_frequencies_table(config.layer, None)

    def new_kv_pages(self, num_pages: int) -> Tensor:
        """[pages, 2 × kv_heads, PAGE_SIZE, head_size], zeroed: as one more layer of a KVCache of that many pages."""
        return zeroed_pages((num_pages, *self._page_shape), self._kv_dtype)

    def fuse(self, tapped: Tensor) -> Tensor:
        """The target's states at `config.taps`, float32 [T, fused_size], to what `forward` takes of a token that the
        target has computed: float32 [T, hidden_size]."""
        parts = self._parts
        if parts.norm is None:
            return tapped
        if parts.fc_norm is not None:
            tapped = rms_norm(tapped, parts.fc_norm, self.config.layer.rms_norm_eps, torch.float32)
        return parts.fc(tapped.to(self._kernels.input_dtype(len(tapped)))).to(torch.float32)

    def forward(self, batch: ForwardBatch, hidden: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """One pass over T rows, of which N want logits; writes their keys and values into `pages`.

        `batch.token_ids` are the tokens one after those that `hidden`, float32 [T, hidden_size], belongs to: fused
        states of the target, or for a draft what this returned for the row before. Returns the rows' own hidden
        states, float32 [T, hidden_size], and logits over draft tokens, float32 [N, draft_vocab_size].
        """
        parts, layer, eps = self._parts, self._parts.layer, self.config.layer.rms_norm_eps
        dtype = self._kernels.input_dtype(len(batch.token_ids))
        step = plan_step(batch, self._rotary, (0,), self.config.layer.num_kv_heads, self._kv_dtype, dtype)
        embedded = F.embedding(batch.token_ids, parts.embedding).to(torch.float32)
        if parts.hidden_norm is None:
            residual = parts.fc(torch.cat((embedded, hidden), 1).to(dtype)).to(torch.float32)
            inputs = residual.to(dtype)
        else:
            normed = rms_norm(hidden, parts.hidden_norm, eps, torch.float32)
            residual = normed if self.config.norm_before_residual else hidden.clone()
            inputs = torch.cat((rms_norm(embedded, layer.input_norm, eps, dtype), normed.to(dtype)), 1)
        attended = layer.attention(inputs, pages, step)
        residual.add_(layer.mlp(add_rms_norm(residual, attended, layer.mlp_norm, eps, dtype)))
        return residual, self._logits(residual[batch.logit_rows])

    def _logits(self, hidden: Tensor) -> Tensor:
        parts = self._parts
        if parts.norm is None:
            return self._target.logits(hidden)
        if parts.head is None:
            raise InternalError("an EAGLE-3 head was loaded without its last product")
        normed = rms_norm(hidden, parts.norm, self.config.layer.rms_norm_eps, torch.float32)
        return parts.head(normed.to(self._kernels.input_dtype(len(normed)))).to(torch.float32)
