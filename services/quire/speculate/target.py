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
from quire.engine.models.weights import Weights
from quire.kernels.rms_norm import add_rms_norm
from quire.service.checkpoint.locate import Checkpoint
from quire.speculate.fused_layer import no_planned_attention, turned_heads


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Of every token of a batch: `tapped` [batch, length, taps × hidden_size], and what goes into the target's head,
    `last` [batch, length, hidden_size]."""

    tapped: Tensor
    last: Tensor


class FrozenTarget:
    """A model's layers run over padded batches, without pages or gradients; products are in `dtype`."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, made: Weights | None = None
    ) -> None:
        """`made` takes the place of the checkpoint's weights. Raises ModelError as
        `quire.engine.models.registry.load_model` does."""
        weights, config, family = open_weights(checkpoint.path, checkpoint.format, lambda *_: None, made)
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
        self._rotations = table.squeeze(2).to(device)
        weights.finish()

    @torch.no_grad()
    def hidden_states(self, token_ids: Tensor, taps: tuple[int, ...]) -> HiddenStates:
        """For token_ids int64 [batch, length], padded at the end; the taps are the inputs of those layers."""
        batch, length = token_ids.shape
        eps, dtype = self.config.rms_norm_eps, self.dtype
        residual = F.embedding(token_ids.flatten(), self.embedding).to(torch.float32)
        positions = torch.arange(length, device=token_ids.device).repeat(batch)
        kept: dict[int, Tensor] = {}
        change = torch.zeros_like(residual)
        with no_planned_attention():
            for index, layer in enumerate(self._layers):
                hidden = add_rms_norm(residual, change, layer.input_norm, eps, dtype)
                if index in taps:
                    kept[index] = residual.to(dtype, copy=True)
                attended = self._attend(layer.attention, hidden, positions, (batch, length))
                change = layer.mlp(add_rms_norm(residual, attended, layer.mlp_norm, eps, dtype))
        last = add_rms_norm(residual, change, self.norm, eps, dtype)
        tapped = torch.cat([kept[tap] for tap in taps], -1)
        return HiddenStates(tapped.view(batch, length, -1), last.view(batch, length, -1))

    @torch.no_grad()
    def logits(self, last: Tensor) -> Tensor:
        """`HiddenStates.last` of any rows, [..., hidden_size] → [..., vocab_size]."""
        return F.linear(last, self.head)

    @torch.no_grad()
    def draft_logits(self, last: Tensor, token_ids: Tensor) -> Tensor:
        """Those of `token_ids` alone: [..., number of tokens]."""
        return F.linear(last, self.head[token_ids])

    def _attend(self, attention: Attention, hidden: Tensor, positions: Tensor, shape: tuple[int, int]) -> Tensor:
        heads = turned_heads(
            attention.qkv(hidden),
            positions,
            self._rotations,
            attention.num_heads,
            attention.head_norm,
            attention.eps,
        )
        queries, keys, values = (tensor.view(*shape, *tensor.shape[1:]).transpose(1, 2) for tensor in heads)
        length, window = shape[1], attention.window
        mask = None
        if 0 < window < length:
            seen = torch.ones(length, length, dtype=torch.bool, device=hidden.device)
            mask = seen.tril() & seen.triu(1 - window)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return attention.output(attended.transpose(1, 2).flatten(2).flatten(0, 1))
