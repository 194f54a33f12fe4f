"""A decoder on a GPU: the families' layers through fused kernels and cuBLAS, with no shape that depends on the batch.

All that depends on it is in device tensors, so that a captured graph of `forward` serves any batch of up to its number
of tokens. The residual stream has the model's type: in float32 everything is, in bfloat16 everything but norms,
softmax and logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quire.engine.models.config import ModelConfig
from quire.engine.models.decoder import rotary_frequencies_table
from quire.engine.models.gpu_linear import GpuLinear, GpuLinears
from quire.engine.models.layer import Attention, Layer, LayerLoader
from quire.engine.models.linear import Linear
from quire.engine.models.model import HiddenTaps, ModelDtype
from quire.engine.models.weights import Weights
from quire.engine.parallel.group import Group
from quire.kernels.attention_new_tokens import attend_new_tokens_triton
from quire.kernels.attention_worklist import AttentionLimits, AttentionShape
from quire.kernels.draft_trees import DraftTrees
from quire.kernels.linear import NormInput
from quire.kernels.paged_attention_triton import (
    TritonAttentionPlan,
    paged_attention_triton,
    plan_attention_triton,
)
from quire.kernels.prefix_groups import group_prefixes
from quire.kernels.rms_norm import add_rms_norm, rms_norm
from quire.kernels.rotary_and_write import HeadNorm, rotary_and_write
from quire.service.errors import InternalError, ModelError
from quire.service.pages import PAGE_SIZE

# Reading a prefix once pays from so many pages on, shared by so many sequences of a step.
MIN_SHARED_PAGES = 16
MIN_SHARING = 4
# Up to so many decodes attention turns and writes its new tokens itself: a launch less. Each part of a context does it
# anew, so with many sequences that is more work than the launch is worth.
_FEW_SEQS = 16


@dataclass(frozen=True, slots=True)
class GpuStep:
    """One step's tokens, flat: T rows of S sequences, N of which want logits. Rows past the step's are padding."""

    token_ids: Tensor  # int32 [T]
    positions: Tensor  # int32 [T]
    slot_mapping: Tensor  # int64 [T], page × PAGE_SIZE + offset; negative for padding, which is not written
    query_start: Tensor  # int32 [S + 1], offsets into T; padding sequences have no queries
    context_lens: Tensor  # int32 [S], tokens with keys and values once this step's are written
    table_rows: Tensor  # int32 [S], each sequence's row in block_tables
    block_tables: Tensor  # int32 [slots, P]
    logit_rows: Tensor | None  # int32 [N], indexes into T; None for all of them
    limits: AttentionLimits
    grouped: bool = False  # whether keys and values that sequences share are read once
    trees: DraftTrees | None = None  # of the sequences, if any may have siblings


@dataclass(frozen=True, slots=True)
class GpuKVCache:
    """The pool of pages on the GPU."""

    keys: tuple[Tensor, ...]  # per layer: [pages, kv_heads, PAGE_SIZE, head_size]
    values: tuple[Tensor, ...]  # the same


class GpuDecoder:
    """A model whose weights are on `device`. `load_layer` is what makes it a model of its family.

    `embedding` [vocab_size, hidden_size]; `linears` made its products, and makes those that run between them. Keys and
    values are kept in `kv_dtype`; None is the model's type. In a `group` weights and `config` are those of its rank:
    `quire.engine.parallel.shards`. `whole_head` is the last product's matrix where this device has all of it.
    """

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        load_layer: Callable[[LayerLoader], Layer],
        dtype: ModelDtype,
        device: torch.device,
        progress: Callable[[float], None],
        kv_dtype: torch.dtype | None = None,
        group: Group | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.group = group
        self.dtype = torch.float32 if dtype is ModelDtype.FLOAT32 else torch.bfloat16
        self.kv_page_bytes = 2 * config.num_layers * config.num_kv_heads * PAGE_SIZE * config.head_size
        self.kv_dtype = kv_dtype or self.dtype
        self.kv_page_bytes *= self.kv_dtype.itemsize
        self.linears = linears = GpuLinears.on(device, self.dtype)
        try:
            embedding = weights.matrix("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
            self.embedding = self._head = linears.matrix([embedding])
            if not config.tie_word_embeddings:
                head = weights.matrix("lm_head.weight", config.vocab_size, config.hidden_size)
                self._head = linears.matrix([head])
            elif group is not None:
                own = group.shard.vocabulary(config.vocab_size)
                self._head = self.embedding[own.start : own.stop]
            self.whole_head = self._head if group is None else self.embedding if config.tie_word_embeddings else None
            self._layers = []
            for index in range(config.num_layers):
                progress(index / config.num_layers)
                self._layers.append(load_layer(LayerLoader(weights, config, linears, index)))
            self._norm = linears.vector(weights.vector("model.norm.weight", config.hidden_size))
        except torch.OutOfMemoryError as error:
            raise _too_large(config, self.dtype, device) from error
        self._qkvs = [on_gpu(layer.attention.qkv) for layer in self._layers]
        self._gate_ups = [on_gpu(layer.mlp.gate_up) for layer in self._layers]
        self._head_norms = [head_norm(layer.attention) for layer in self._layers]
        divisors = weights.frequency_divisors(config.head_size // 2)
        self._rotary = rotary_frequencies_table(config, divisors).to(device)
        progress(1.0)

    def new_kv_cache(self, num_pages: int) -> GpuKVCache:
        """A pool of `num_pages` pages, not cleared: attention on a GPU reads no slot that is not written.

        Raises ModelError if memory does not suffice.
        """
        shape = (num_pages, self.config.num_kv_heads, PAGE_SIZE, self.config.head_size)
        try:
            keys, values = (
                tuple(
                    torch.empty(shape, dtype=self.kv_dtype, device=self.device) for _ in range(self.config.num_layers)
                )
                for _ in range(2)
            )
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{num_pages} pages of keys and values need {num_pages * self.kv_page_bytes} bytes, more than the GPU "
                "has free: lower num_pages, kv_cache_bytes or gpu_memory_utilization",
                field="num_pages",
            ) from error
        return GpuKVCache(keys, values)

    def forward(self, step: GpuStep, cache: GpuKVCache, taps: HiddenTaps | None = None) -> Tensor:
        """The normalized hidden states of the rows that want logits, [N, hidden_size] of the model's type.

        Writes the step's keys and values into `cache`, and what `taps` asks for into it.
        """
        eps = self.config.rms_norm_eps
        plans = self._plan(step)
        residual = F.embedding(step.token_ids, self.embedding)
        hidden = rms_norm(residual, self._layers[0].input_norm, eps, self.dtype)
        for index, layer in enumerate(self._layers):
            kept = None
            if index:
                kept = None if taps is None else taps.place(index)
                qkv, residual = self._qkvs[index].normed(hidden, NormInput(residual, layer.input_norm, eps, kept))
            else:
                qkv = self._qkvs[index](hidden)
            if taps is not None and kept is None:
                taps.keep(index, residual)
            plan, norm = plans[layer.attention.window], self._head_norms[index]
            keys, values = cache.keys[index], cache.values[index]
            attended = attend(layer.attention, norm, qkv, step, plan, self._rotary, keys, values)
            if self.group is not None:
                self.group.sum(attended)
            gated, residual = self._gate_ups[index].normed(attended, NormInput(residual, layer.mlp_norm, eps), True)
            hidden = layer.mlp.down(gated)
            if self.group is not None:
                self.group.sum(hidden)
        if taps is not None and self.config.num_layers in taps.layers:
            hidden = add_rms_norm(residual, hidden, self._norm, eps, self.dtype)
            taps.keep(self.config.num_layers, hidden)
            return hidden if step.logit_rows is None else hidden.index_select(0, step.logit_rows)
        if step.logit_rows is not None:
            residual, hidden = residual.index_select(0, step.logit_rows), hidden.index_select(0, step.logit_rows)
        return add_rms_norm(residual, hidden, self._norm, eps, self.dtype)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [N, hidden_size], as `forward` gives it → float32 [N, vocab_size]; a group puts them into `out`, if it
        is given.

        Not rounded to bfloat16 on the way: largest logits of 20 to 30 would be multiples of 1/8, and two greedy tokens
        in a hundred others.
        """
        logits = last_product(hidden, self._head)
        return logits if self.group is None else self.group.gather_columns(logits, self.config.vocab_size, out)

    def _plan(self, step: GpuStep) -> Mapping[int, TritonAttentionPlan]:
        config = self.config
        groups = None
        if step.grouped:
            groups = group_prefixes(
                step.query_start, step.context_lens, step.block_tables, step.table_rows, PAGE_SIZE,
                step.limits.max_tokens, MIN_SHARED_PAGES, MIN_SHARING,
            )  # fmt: skip
        return {
            window: plan_attention_triton(
                step.query_start,
                step.context_lens,
                step.block_tables,
                AttentionShape(config.num_heads, config.num_kv_heads, config.head_size, window),
                step.limits,
                step.table_rows,
                groups=None if window else groups,
                trees=step.trees,
                listed=True,  # the embedding's launch waits
            )
            for window in sorted(set(config.windows))
        }


def attend(
    attention: Attention,
    norm: HeadNorm | None,
    qkv: Tensor,
    step: GpuStep,
    plan: TritonAttentionPlan,
    rotary: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """A layer's attention behind its first product: qkv [T, heads · head_size] → [T, hidden_size]; writes the step's
    keys and values into their pages.

    rotary as of `rotary_table`; keys, values [pages, kv_heads, PAGE_SIZE, head_size].
    """
    qkv = qkv.view(qkv.shape[0], -1, attention.head_size)
    limits = step.limits
    if limits.max_query_len == 1 and limits.max_seqs <= _FEW_SEQS and plan.prefixes is None:
        attended = attend_new_tokens_triton(qkv, rotary, norm, keys, values, plan)
    else:
        queries = rotary_and_write(qkv, step.positions, rotary, step.slot_mapping, keys, values, norm)
        attended = paged_attention_triton(queries, keys, values, plan)
    return attention.output(attended.view(qkv.shape[0], -1))


def last_product(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden [N, K] times head [M, K] of its type → float32 [N, M], rounded to no other type on the way."""
    if hidden.is_cuda and hidden.dtype is not torch.float32:
        return torch.mm(hidden, head.t(), out_dtype=torch.float32)
    return F.linear(hidden, head).to(torch.float32)


def on_gpu(linear: Linear) -> GpuLinear:
    """The same; raises InternalError if it was loaded for a CPU."""
    if not isinstance(linear, GpuLinear):
        raise InternalError("a layer of a GPU's model was not loaded for it")
    return linear


def head_norm(attention: Attention) -> HeadNorm | None:
    """Its norm over heads, as kernels take it."""
    if attention.head_norm is None:
        return None
    return HeadNorm(attention.head_norm[0].contiguous(), attention.head_norm[-1].contiguous(), attention.eps)


def _too_large(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> ModelError:
    free, total = torch.cuda.mem_get_info(device)
    attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_size * config.hidden_size
    layers = config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    heads = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    needed = (layers + heads) * dtype.itemsize
    return ModelError(
        f"the model's weights need {needed} bytes and the GPU has {total}, of which {free} are left: {needed - total} "
        "bytes are missing at least; use dtype bfloat16, a smaller model or a larger GPU",
        field="model",
    )
