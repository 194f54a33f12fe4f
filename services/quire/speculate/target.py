"""The target over whole sequences, frozen: what a head is trained on and evaluated with. Any family, any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quire.engine.models.decoder import rotary_frequencies_table
from quire.engine.models.gpu_linear import GpuLinears
from quire.engine.models.layer import Attention, LayerLoader
from quire.engine.models.registry import open_weights
from quire.kernels.rotary import rotary
from quire.service.checkpoint.locate import Checkpoint


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Of every token of a batch: `tapped` [batch, length, taps × hidden_size], and what goes into the target's head,
    `last` [batch, length, hidden_size]."""

    tapped: Tensor
    last: Tensor


class FrozenTarget:
    """A model's layers run over padded batches, without pages or gradients; products are in `dtype`."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        """Raises ModelError as `quire.engine.models.registry.load_model` does."""
        weights, config, family = open_weights(checkpoint.path, checkpoint.format, lambda *_: None)
        self.config = config
        self.device = device
        self.dtype = dtype
        # No kernels of few rows: there are thousands.
        linears = GpuLinears(device, dtype, None)
        self.embedding = self.head = linears.matrix(
            [weights.matrix("model.embed_tokens.weight", config.vocab_size, config.hidden_size)]
        )
        if not config.tie_word_embeddings:
            self.head = linears.matrix([weights.matrix("lm_head.weight", config.vocab_size, config.hidden_size)])
        loaders = (LayerLoader(weights, config, linears, index) for index in range(config.num_layers))
        self._layers = [family.load_layer(loader) for loader in loaders]
        self.norm = linears.vector(weights.vector("model.norm.weight", config.hidden_size))
        table = rotary_frequencies_table(config, weights.frequency_divisors(config.head_size // 2))
        self._rotations = table.to(device)
        weights.finish()

    @torch.no_grad()
    def hidden_states(self, token_ids: Tensor, taps: tuple[int, ...]) -> HiddenStates:
        """For token_ids int64 [batch, length], padded at the end; the taps are the inputs of those layers."""
        batch, length = token_ids.shape
        residual = F.embedding(token_ids, self.embedding).to(torch.float32)
        kept = {}
        for index, layer in enumerate(self._layers):
            if index in taps:
                kept[index] = residual.to(self.dtype)
            attended = self._attend(layer.attention, self._normed(residual, layer.input_norm))
            residual = residual + attended
            hidden = self._normed(residual, layer.mlp_norm).view(batch * length, -1)
            residual = residual + layer.mlp(hidden).view_as(residual)
        return HiddenStates(torch.cat([kept[tap] for tap in taps], -1), self._normed(residual, self.norm))

    @torch.no_grad()
    def logits(self, last: Tensor) -> Tensor:
        """`HiddenStates.last` of any rows, [..., hidden_size] → [..., vocab_size]."""
        return F.linear(last, self.head)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps).to(self.dtype)

    def _attend(self, attention: Attention, hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        qkv = attention.qkv(hidden.view(batch * length, -1)).view(batch, length, -1, attention.head_size)
        turned = qkv[:, :, : attention.num_rotated]
        if attention.head_norm is not None:
            scale = turned.to(torch.float32).pow(2).mean(-1, keepdim=True).add(attention.eps).rsqrt()
            turned = turned * scale * attention.head_norm
        cos, sin = self._rotations[:length].unbind(1)
        turned = rotary(turned, cos, sin).to(self.dtype).transpose(1, 2)
        queries, keys = turned[:, : attention.num_heads], turned[:, attention.num_heads :]
        values = qkv[:, :, attention.num_rotated :].transpose(1, 2)
        window = attention.window
        mask = None
        if 0 < window < length:
            seen = torch.ones(length, length, dtype=torch.bool, device=hidden.device)
            mask = seen.tril() & seen.triu(1 - window)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        flat = attended.transpose(1, 2).reshape(batch * length, -1)
        return attention.output(flat).view(batch, length, -1)
