"""A decoder on the CPU: token embeddings, a family's layers, a norm and the head.

The residual stream is float32; what goes through products and pages has the types that `LinearKernels` chooses.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quire.engine.models.config import ModelConfig
from quire.engine.models.head import Head
from quire.engine.models.layer import Layer, LayerLoader
from quire.engine.models.linear import LinearKernels
from quire.engine.models.memory import available_memory
from quire.engine.models.model import ForwardBatch, HiddenTaps, KVCache, ModelDtype
from quire.engine.models.step import plan_step
from quire.engine.models.weights import Weights, dense
from quire.kernels.rms_norm import add_rms_norm, rms_norm
from quire.kernels.rotary import rotary_table
from quire.service.errors import ModelError
from quire.service.pages import PAGE_SIZE


class Decoder:
    """`quire.engine.models.model.Model` on the CPU. `load_layer` is what makes it a model of its family."""

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        load_layer: Callable[[LayerLoader], Layer],
        dtype: ModelDtype,
        progress: Callable[[float], None],
    ) -> None:
        self.config = config
        self._kernels = LinearKernels.choose(dtype, _num_parameters(config), available_memory())
        # Attention is a product too: in bfloat16 it pays where the CPU has instructions for it.
        self._kv_dtype = self._kernels.large
        self.kv_page_bytes = (
            2 * config.num_layers * config.num_kv_heads * PAGE_SIZE * config.head_size * self._kv_dtype.itemsize
        )
        head = weights.matrix("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.embedding = head_rows = dense(head).to(torch.float32 if dtype is ModelDtype.FLOAT32 else torch.bfloat16)
        self._layers: list[Layer] = []
        for index in range(config.num_layers):
            progress(index / config.num_layers)
            self._layers.append(load_layer(LayerLoader(weights, config, self._kernels, index)))
        self._norm = weights.vector("model.norm.weight", config.hidden_size)
        if not config.tie_word_embeddings:
            head = weights.matrix("lm_head.weight", config.vocab_size, config.hidden_size)
            head_rows = dense(head).to(self.embedding.dtype)
        self._head = Head(self._kernels.linear(head), head_rows)
        self._rotary = rotary_frequencies_table(config, weights.frequency_divisors(config.head_size // 2))
        progress(1.0)

    def new_kv_cache(self, num_pages: int) -> KVCache:
        """A pool of `num_pages` zeroed pages; raises ModelError if memory does not suffice."""
        config, needed, free = self.config, num_pages * self.kv_page_bytes, available_memory()
        if free is not None and needed > free:
            raise ModelError(
                f"{num_pages} pages of keys and values need {needed} bytes and {free} are free: "
                f"lower num_pages to {free // self.kv_page_bytes} or less",
                field="num_pages",
            )
        shape = (num_pages, 2 * config.num_kv_heads, PAGE_SIZE, config.head_size)
        return KVCache(tuple(zeroed_pages(shape, self._kv_dtype) for _ in range(config.num_layers)))

    def forward(self, batch: ForwardBatch, cache: KVCache, taps: HiddenTaps | None = None) -> Tensor:
        """Logits, float32 [N, vocab_size], of the rows asked for; writes the batch's keys and values into `cache`."""
        config, eps = self.config, self.config.rms_norm_eps
        dtype = self._kernels.input_dtype(batch.token_ids.shape[0])
        step = plan_step(batch, self._rotary, set(config.windows), config.num_kv_heads, self._kv_dtype, dtype)
        residual = F.embedding(batch.token_ids, self.embedding).to(torch.float32)
        hidden = rms_norm(residual, self._layers[0].input_norm, eps, dtype)
        norms = [layer.input_norm for layer in self._layers[1:]]
        for index, (layer, pages) in enumerate(zip(self._layers, cache.pages, strict=True)):
            if taps is not None:
                taps.keep(index, residual)
            attended = layer.attention(hidden, pages, step)
            hidden = layer.mlp(add_rms_norm(residual, attended, layer.mlp_norm, eps, dtype))
            if norms:
                hidden = add_rms_norm(residual, hidden, norms.pop(0), eps, dtype)
        residual.add_(hidden)
        if taps is not None and config.num_layers in taps.layers:
            taps.keep(config.num_layers, rms_norm(residual, self._norm, eps, torch.float32))
        return self._head(rms_norm(residual[batch.logit_rows], self._norm, eps, torch.float32))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, hidden_size], normalized as before the head → float32 [N, vocab_size]."""
        return self._head(hidden.to(torch.float32))


def rotary_frequencies_table(config: ModelConfig, divisors: Tensor | None) -> Tensor:
    """Cosines and sines of all positions, as `rotary_table` gives them; `divisors` float32 [head_size / 2] or none."""
    inv_freq = config.rope.inverse_frequencies(config.head_size)
    if divisors is not None:
        inv_freq = inv_freq / divisors
    table = rotary_table(config.max_model_len, inv_freq)
    return table.mul_(config.rope.attention_factor)


def _num_parameters(config: ModelConfig) -> int:
    attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_size * config.hidden_size
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * (attention + mlp) + 2 * config.vocab_size * config.hidden_size


def zeroed_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One layer's pages of a KVCache."""
    # numpy leaves zeroing to the operating system, which does it when a page of memory is touched; torch.zeros would
    # touch all of the pool at the start.
    return torch.from_numpy(np.zeros(np.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
