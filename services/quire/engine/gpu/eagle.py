"""An EAGLE head on a GPU: one more layer over the model's block tables, with keys and values of its own in each page.

The head pairs a token with the model's hidden state of the token before it. Their keys and values lie in the token's
slot, so a slot depends on its token and on those before, as the model's do and as page hashes say: a page that prompts
share is right for all of them. (By the state's position it would depend on the first token of the page that follows.)
Position 0 has no state before it: its slot is never written, and attention begins with the next.

So a step that computes positions s to e - 1 writes slots s + 1 to e, after its draw: by then the token at e is known,
drawn or a prompt's. That slots 1 to s are right when it begins follows by induction:

- A step's rows up to its last right position a, which is e - 1 without drafts, have right states and right tokens
  behind them, that at a + 1 being drawn. The next step begins at a + 1, or earlier where the host takes a draw back.
- Rows behind a wrong draft write slots from a + 2 on, as drafting does: the next step writes all of these again, or
  they are behind its end, before anything reads them.
- A sequence that joins with c tokens in pages that are there begins at c - 1: of these c the head's slots are right,
  and the state of c - 1 is what slot c needs. (The model's slot c - 1 is written once more, with the same.) So does one
  whose slot e had no page, in the scheduler's words: there the entry in the block table is the page past the model's
  last, which the head has, too, for what nobody reads.

After a preemption or a move a sequence begins at 0, or with pages that are there.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quire.engine.models.decoder import rotary_frequencies_table
from quire.engine.models.gpu_decoder import GpuDecoder, GpuKVCache, GpuStep, attend, head_norm, last_product, on_gpu
from quire.engine.models.gpu_linear import GpuLinear
from quire.engine.models.model import HiddenTaps
from quire.engine.speculation.eagle.checkpoint import open_eagle
from quire.engine.speculation.eagle.config import EagleKind
from quire.engine.speculation.eagle.dummy import dummy_eagle
from quire.engine.speculation.eagle.parts import EagleParts, load_parts
from quire.kernels.attention_worklist import AttentionShape, list_work
from quire.kernels.eagle_inputs import EagleNorms, eagle_inputs, found_eagle_inputs
from quire.kernels.linear import NormInput, linear
from quire.kernels.paged_attention_triton import TritonAttentionPlan
from quire.kernels.rms_norm import add_rms_norm, rms_norm
from quire.kernels.rotary_and_write import rotary_and_write
from quire.kernels.step_inputs import StepInputs, StepSource
from quire.service.errors import InternalError, ModelError
from quire.service.pages import PAGE_SIZE


def load_gpu_eagle(path: Path, target: GpuDecoder, *, dummy: bool = False) -> GpuEagle:
    """The head in the folder `path`, in either published layout, for `target`; `dummy` makes random weights for one
    that has only config.json.

    Raises ModelError that names the setting or tensor at fault, and what to do.
    """
    if dummy:
        checkpoint = dummy_eagle(path, target.config, target.device, target.dtype)
    else:
        checkpoint = open_eagle(path, target.config)
    if checkpoint.config.kind is EagleKind.EAGLE1 and target.whole_head is None:
        raise ModelError(
            f"{path} is an EAGLE-1 head, which ends in the model's own last product, and with --tensor-parallel-size "
            "each GPU has a part of that: name an EAGLE-3 head",
            field="speculative_model",
        )
    try:
        return GpuEagle(load_parts(checkpoint, target, target.linears), target)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the GPU has no memory left for the head in {path}: use a smaller model or a larger GPU",
            field="speculative_model",
        ) from error


class GpuEagle:
    """A loaded head. `kv_page_bytes` is what it adds to the memory of one of the model's pages."""

    def __init__(self, parts: EagleParts, target: GpuDecoder) -> None:
        self.config = config = parts.config
        self.device, self.dtype = target.device, target.dtype
        layer, attention = config.layer, parts.layer.attention
        self._parts, self._target = parts, target
        self._eps = layer.rms_norm_eps
        self._head_norm = head_norm(attention)
        self._gate_up = on_gpu(parts.layer.mlp.gate_up)
        self._shape = AttentionShape(layer.num_heads, layer.num_kv_heads, layer.head_size)
        self._page_shape = (layer.num_kv_heads, PAGE_SIZE, layer.head_size)
        self.kv_page_bytes = 2 * layer.num_kv_heads * PAGE_SIZE * layer.head_size * self.dtype.itemsize
        qkv, queries = on_gpu(attention.qkv), layer.num_heads * layer.head_size
        bias = None if qkv.bias is None else qkv.bias[queries:]
        self._key_values = GpuLinear(qkv.weight[queries:], bias, qkv.space)
        self._rotary = rotary_frequencies_table(layer, None).to(self.device)
        self._norms = None
        if parts.hidden_norm is not None:
            self._norms = EagleNorms(parts.layer.input_norm, parts.hidden_norm, self._eps)
        self.target_ids = None if parts.target_ids is None else parts.target_ids.to(self.device)

    def new_kv_cache(self, num_pages: int) -> GpuKVCache:
        """Its keys and values in as many pages as the model has, and one for what is written nowhere.

        Raises ModelError if memory does not suffice.
        """
        shape = (num_pages + 1, *self._page_shape)
        try:
            keys, values = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{num_pages} pages of the head's keys and values need {num_pages * self.kv_page_bytes} bytes, more "
                "than the GPU has free: lower num_pages, kv_cache_bytes or gpu_memory_utilization",
                field="num_pages",
            ) from error
        return GpuKVCache((keys,), (values,))

    def new_taps(self, num_tokens: int) -> HiddenTaps:
        """For steps of the model of up to so many tokens."""
        config = self.config
        return HiddenTaps.new(config.taps, num_tokens, config.target_hidden_size, self.dtype, self.device)

    def write(self, source: StepSource, rows: StepInputs, tapped: Tensor, fused: Tensor, cache: GpuKVCache) -> None:
        """Writes the keys and values of the tokens one position after each of a step's T rows, which are `source`'s,
        into their slots; fills `rows` with these tokens.

        tapped [T, fused_size]: the model's states of the step's rows. `fused` [T, hidden_size] is filled with what
        `forward` takes of them. This needs no attention, as keys and values depend on no other layer.
        """
        inputs = found_eagle_inputs(source, rows, self._parts.embedding, self._fuse(tapped), self._norms, fused)
        if self._norms is None:
            inputs = self._parts.fc(inputs)
        key_values = self._key_values(inputs).view(len(tapped), -1, self._shape.head_size)
        (keys,), (values,) = cache.keys, cache.values
        rotary_and_write(key_values, rows.positions, self._rotary, rows.slot_mapping, keys, values, self._head_norm)

    def forward(self, step: GpuStep, hidden: Tensor, cache: GpuKVCache, skipped: Tensor) -> Tensor:
        """One token of each of S sequences: float32 [S, draft_vocab_size], the logits of those that may follow.
        Writes the tokens' keys and values into `cache`.

        hidden [S, hidden_size]: fused states of the model, or what this left there for the tokens before; it is left
        with those of these. skipped int32 [S]: ones, so many first positions having no keys.
        """
        layer, residual = self._parts.layer, torch.empty_like(hidden)
        keep_normed = self.config.norm_before_residual and self._norms is not None
        inputs = eagle_inputs(step.token_ids, self._parts.embedding, hidden, self._norms, residual, keep_normed)
        if self._norms is None:
            inputs = residual = self._parts.fc(inputs)
        lists = list_work(
            step.query_start, step.context_lens, self._shape, step.limits, step.table_rows, None, prefix_lens=skipped
        )
        plan = TritonAttentionPlan(self._shape, step.block_tables, lists)
        (keys,), (values,) = cache.keys, cache.values
        qkv = layer.attention.qkv(inputs)
        attended = attend(layer.attention, self._head_norm, qkv, step, plan, self._rotary, keys, values)
        gated, residual = self._gate_up.normed(attended, NormInput(residual, layer.mlp_norm, self._eps), True)
        return self._logits(residual, layer.mlp.down(gated), hidden)

    def _fuse(self, tapped: Tensor) -> Tensor:
        """[T, fused_size] → [T, hidden_size] of the same type."""
        parts = self._parts
        if parts.norm is None:
            return tapped
        if parts.fc_norm is not None:
            tapped = rms_norm(tapped, parts.fc_norm, self._eps, self.dtype)
        return parts.fc(tapped)

    def _logits(self, residual: Tensor, hidden: Tensor, kept: Tensor) -> Tensor:
        """Of the residual stream with `hidden` in it, which `kept` is filled with."""
        parts, whole_head = self._parts, self._target.whole_head
        if parts.norm is None and whole_head is not None:
            return last_product(kept.copy_(residual.add_(hidden)), whole_head)
        if parts.norm is None or parts.head is None:
            raise InternalError("a head was loaded without its last product")
        head = on_gpu(parts.head)
        normed = add_rms_norm(residual, hidden, parts.norm, self._eps, self.dtype, kept)
        return linear(normed, head.weight, None, head.space, dependent=True, dtype=torch.float32)
