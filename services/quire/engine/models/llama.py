"""Llama: the decoder of Touvron et al. (2023) with grouped queries, and all models that share its shape (SmolLM2).

Layer: x += attention(norm(x)); x += down(silu(gate(norm(x))) · up(norm(x))). The residual stream x is float32; what
goes through products and pages has the types that `LinearKernels` and the KV cache choose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quire.engine.models.config import ModelConfig
from quire.engine.models.linear import Linear, LinearKernels
from quire.engine.models.memory import available_memory
from quire.engine.models.model import ForwardBatch, KVCache, ModelDtype
from quire.engine.models.weights import LinearWeight, Weights, dense, stack
from quire.kernels.paged_attention import AttentionPlan, paged_attention, plan_attention
from quire.kernels.rms_norm import add_rms_norm, rms_norm
from quire.kernels.rotary import rotary, rotary_table
from quire.kernels.silu_and_mul import silu_and_mul
from quire.kernels.write_pages import WritePlan, plan_writes, write_pages
from quire.service.errors import ModelError
from quire.service.pages import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: Linear
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of a step share."""

    writes: WritePlan
    attention: AttentionPlan
    cos: Tensor
    sin: Tensor
    dtype: torch.dtype  # of the linear layers' inputs


class Llama:
    """`quire.engine.models.model.Model` on the CPU."""

    def __init__(self, weights: Weights, dtype: ModelDtype, progress: Callable[[float], None]) -> None:
        config = self.config = weights.config
        self._kernels = LinearKernels.choose(dtype, _num_parameters(config), available_memory())
        # Attention is a product too: in bfloat16 it pays where the CPU has instructions for it.
        self._kv_dtype = self._kernels.large
        self.kv_page_bytes = (
            2 * config.num_layers * config.num_kv_heads * PAGE_SIZE * config.head_size * self._kv_dtype.itemsize
        )
        embedding = weights.matrix("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self._embedding = dense(embedding).to(torch.float32 if dtype is ModelDtype.FLOAT32 else torch.bfloat16)
        self._layers: list[_Layer] = []
        for index in range(config.num_layers):
            progress(index / config.num_layers)
            self._layers.append(self._load_layer(weights, f"model.layers.{index}."))
        self._norm = weights.vector("model.norm.weight", config.hidden_size)
        if not config.tie_word_embeddings:
            embedding = weights.matrix("lm_head.weight", config.vocab_size, config.hidden_size)
        self._head = self._kernels.linear(embedding)
        inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, config.head_size, 2).float() / config.head_size)
        self._rotary = rotary_table(config.max_model_len, inv_freq)
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
        shape = (num_pages, config.num_kv_heads, PAGE_SIZE, config.head_size)
        layers = range(config.num_layers)
        return KVCache(
            tuple(_zeros(shape, self._kv_dtype) for _ in layers), tuple(_zeros(shape, self._kv_dtype) for _ in layers)
        )

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Logits, float32 [N, vocab_size], of the rows asked for; writes the batch's keys and values into `cache`."""
        eps = self.config.rms_norm_eps
        step = self._prepare(batch)
        residual = F.embedding(batch.token_ids, self._embedding).to(torch.float32)
        hidden = rms_norm(residual, self._layers[0].input_norm, eps, step.dtype)
        norms = [layer.input_norm for layer in self._layers[1:]]
        for layer, keys, values in zip(self._layers, cache.keys, cache.values, strict=True):
            attended = self._attend(layer, hidden, keys, values, step)
            hidden = add_rms_norm(residual, attended, layer.mlp_norm, eps, step.dtype)
            hidden = layer.down(silu_and_mul(layer.gate_up(hidden)))
            if norms:
                hidden = add_rms_norm(residual, hidden, norms.pop(0), eps, step.dtype)
        rows = residual.add_(hidden)[batch.logit_rows]
        logits = self._head(rms_norm(rows, self._norm, eps, self._kernels.input_dtype(rows.shape[0])))
        return logits.to(torch.float32)

    def _attend(self, layer: _Layer, hidden: Tensor, keys: Tensor, values: Tensor, step: _Step) -> Tensor:
        config = self.config
        num_rotated = config.num_heads + config.num_kv_heads
        qkv = layer.qkv(hidden).view(hidden.shape[0], -1, config.head_size)
        rotated = rotary(qkv[:, :num_rotated], step.cos, step.sin)
        write_pages(rotated[:, config.num_heads :], qkv[:, num_rotated:], keys, values, step.writes)
        queries = rotated[:, : config.num_heads].to(self._kv_dtype)
        attended = paged_attention(queries, keys, values, step.attention)
        return layer.output(attended.view(hidden.shape[0], -1).to(step.dtype))

    def _prepare(self, batch: ForwardBatch) -> _Step:
        num_kv_heads = self.config.num_kv_heads
        cos, sin = self._rotary[batch.positions].unbind(1)
        return _Step(
            writes=plan_writes(batch.slot_mapping, num_kv_heads, PAGE_SIZE),
            attention=plan_attention(
                batch.query_start, batch.context_lens, batch.block_tables, num_kv_heads, PAGE_SIZE, self._kv_dtype
            ),
            cos=cos,
            sin=sin,
            dtype=self._kernels.input_dtype(batch.token_ids.shape[0]),
        )

    def _load_layer(self, weights: Weights, prefix: str) -> _Layer:
        config = self.config
        hidden, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads

        def matrix(name: str, rows: int, columns: int) -> LinearWeight:
            return weights.matrix(f"{prefix}{name}.weight", rows, columns)

        q = matrix("self_attn.q_proj", heads * config.head_size, hidden)
        k, v = (matrix(f"self_attn.{name}_proj", kv_heads * config.head_size, hidden) for name in "kv")
        gate, up = (matrix(f"mlp.{name}_proj", config.intermediate_size, hidden) for name in ("gate", "up"))
        linear = self._kernels.linear
        return _Layer(
            input_norm=weights.vector(f"{prefix}input_layernorm.weight", hidden),
            qkv=linear(stack((q, k, v))),
            output=linear(matrix("self_attn.o_proj", hidden, heads * config.head_size)),
            mlp_norm=weights.vector(f"{prefix}post_attention_layernorm.weight", hidden),
            gate_up=linear(stack((gate, up))),
            down=linear(matrix("mlp.down_proj", hidden, config.intermediate_size)),
        )


def _num_parameters(config: ModelConfig) -> int:
    attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_size * config.hidden_size
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * (attention + mlp) + 2 * config.vocab_size * config.hidden_size


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # numpy leaves zeroing to the operating system, which does it when a page of memory is touched; torch.zeros would
    # touch all of the pool at the start.
    return torch.from_numpy(np.zeros(np.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
