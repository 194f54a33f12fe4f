"""The layer that all families have: attention and a gated feed-forward network, each behind a norm and added to the
residual stream. What a family does differently it says where it loads one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.engine.models.config import ModelConfig
from quire.engine.models.linear import Linear, LinearFactory
from quire.engine.models.step import Step
from quire.engine.models.weights import Tensors
from quire.kernels.paged_attention import paged_attention
from quire.kernels.rms_norm import rms_norm
from quire.kernels.rotary import rotary
from quire.kernels.silu_and_mul import silu_and_mul
from quire.kernels.write_pages import write_pages


class LayerLoader:
    """Layer `index` of a checkpoint, part by part, by Hugging Face's names within the layer."""

    def __init__(self, weights: Tensors, config: ModelConfig, kernels: LinearFactory, index: int) -> None:
        self.config = config
        self.index = index
        self._weights = weights
        self._kernels = kernels
        self._prefix = f"model.layers.{index}."

    def vector(self, name: str, size: int) -> Tensor:
        """Float32 [size], on the device."""
        return self._kernels.vector(self._weights.vector(f"{self._prefix}{name}", size))

    def linear(self, parts: dict[str, int], columns: int, bias: bool = False) -> Linear:
        """One product for several matrices, each given as its name and number of rows."""
        weights = [self._weights.matrix(f"{self._prefix}{name}.weight", n, columns) for name, n in parts.items()]
        biases = [self.vector(f"{name}.bias", n) for name, n in parts.items()] if bias else []
        return self._kernels.stacked(weights, torch.cat(biases) if biases else None)


class Attention:
    """Grouped-query attention with rotary positions over paged keys and values.

    Called on a CPU; a GPU has its own way through the same parts: `quire.engine.models.gpu_decoder`.
    """

    def __init__(
        self,
        loader: LayerLoader,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        head_norms: bool = False,
        window: int = 0,
        input_size: int = 0,
    ) -> None:
        """`head_norms`: queries and keys are normalized per head. `window`: how many tokens a query sees, 0 is all.
        `input_size`: of the vectors that are attended to, 0 is the hidden size."""
        config = loader.config
        self.num_heads, self.head_size, self.eps = config.num_heads, config.head_size, config.rms_norm_eps
        self.num_rotated = config.num_heads + config.num_kv_heads
        self.window = window
        rows, kv_rows = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.qkv = loader.linear(
            {"self_attn.q_proj": rows, "self_attn.k_proj": kv_rows, "self_attn.v_proj": kv_rows},
            input_size or config.hidden_size,
            qkv_bias,
        )
        self.output = loader.linear({"self_attn.o_proj": config.hidden_size}, rows, output_bias)
        self.head_norm: Tensor | None = None
        if head_norms:
            # One norm for queries and keys: [heads + kv_heads, head_size].
            query, key = (loader.vector(f"self_attn.{name}_norm.weight", config.head_size) for name in "qk")
            self.head_norm = torch.stack([query] * config.num_heads + [key] * config.num_kv_heads)

    def __call__(self, hidden: Tensor, pages: Tensor, step: Step) -> Tensor:
        """hidden [T, hidden_size] of `step.dtype` → the same shape, of a float type; writes the step's keys and values
        into the layer's pages first."""
        num_tokens = hidden.shape[0]
        qkv = self.qkv(hidden).view(num_tokens, -1, self.head_size)
        given = qkv.narrow(1, 0, self.num_rotated)
        if self.head_norm is not None:
            given = rms_norm(given.to(torch.float32), self.head_norm, self.eps, torch.float32)
        qkv = qkv.type(pages.dtype)
        rotary(given, step.cos, step.sin, out=qkv.narrow(1, 0, self.num_rotated))
        queries, keys_and_values = qkv.split_with_sizes((self.num_heads, qkv.shape[1] - self.num_heads), 1)
        write_pages(keys_and_values, pages, step.writes)
        attended = paged_attention(queries, pages, step.attention[self.window])
        return self.output(attended.view(num_tokens, -1).type(step.dtype))


class GatedMlp:
    """down(silu(gate(x)) · up(x)); called on a CPU, as `Attention` is."""

    def __init__(self, loader: LayerLoader) -> None:
        config = loader.config
        size = config.intermediate_size
        self.gate_up = loader.linear({"mlp.gate_proj": size, "mlp.up_proj": size}, config.hidden_size)
        self.down = loader.linear({"mlp.down_proj": config.hidden_size}, size)

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [T, hidden_size] → the same shape, of a float type."""
        return self.down(silu_and_mul(self.gate_up(hidden)))


@dataclass(frozen=True, slots=True)
class Layer:
    """x += attention(input_norm(x)); x += mlp(mlp_norm(x))."""

    input_norm: Tensor  # float32 [hidden_size]
    attention: Attention
    mlp_norm: Tensor  # the same
    mlp: GatedMlp
