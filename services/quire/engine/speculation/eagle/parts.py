"""A head's weights where a device computes with them; who runs them is `head` on a CPU, `quire.engine.gpu.eagle` on a
GPU.

What the head has no tensors of its own for it takes from the target: embeddings, and in EAGLE-1 the last product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quire.engine.models.config import ModelConfig
from quire.engine.models.layer import Attention, GatedMlp, Layer, LayerLoader
from quire.engine.models.linear import Linear, LinearFactory
from quire.engine.models.weights import dense
from quire.engine.speculation.eagle.checkpoint import EagleCheckpoint, HeadTensors
from quire.engine.speculation.eagle.config import EagleConfig, EagleKind
from quire.service.errors import ModelError


class Target(Protocol):
    """The model that a head drafts for, as far as a head uses it."""

    config: ModelConfig
    embedding: Tensor  # [vocab_size, hidden_size] of any float type

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, hidden_size], after the final norm → float32 [N, vocab_size]."""


@dataclass(frozen=True, slots=True)
class EagleParts:
    """EAGLE-3: h = fc(taps), then layer([input_norm(e) | hidden_norm(h)]), then head(norm(·)) over draft tokens.

    EAGLE-1: layer(fc([e | h])), whose attention has no norm before it; the target's own head follows. e is the
    embedding of the token after the one that h belongs to.
    """

    config: EagleConfig
    embedding: Tensor  # [vocab_size, hidden_size] of any float type
    fc: Linear
    fc_norm: Tensor | None  # float32 [fused_size]
    layer: Layer  # in EAGLE-1 the input norm is not used
    hidden_norm: Tensor | None  # float32 [hidden_size]
    norm: Tensor | None  # the same
    head: Linear | None  # None: the target's
    target_ids: Tensor | None  # int64 [draft_vocab_size]; None: draft tokens are the target's


def load_parts(checkpoint: EagleCheckpoint, target: Target, linears: LinearFactory) -> EagleParts:
    """Loads the head with its products and vectors from `linears`; the mapping stays on the CPU, embeddings are
    where the target's are.

    Raises ModelError that names the tensor that is missing, left over or misshapen.
    """
    config, weights = checkpoint.config, checkpoint.weights
    size, eagle3 = config.hidden_size, config.kind is EagleKind.EAGLE3
    loader = LayerLoader(weights, config.layer, linears, 0)

    def norm(name: str, count: int) -> Tensor:
        return linears.vector(weights.vector(name, count))

    parts = EagleParts(
        config,
        embedding=_embedding(weights, config, target),
        fc=linears.stacked(
            [weights.matrix("fc.weight", size, config.fused_size if eagle3 else 2 * size)],
            norm("fc.bias", size) if "fc.bias" in weights else None,
        ),
        fc_norm=norm("input_norm.weight", config.fused_size) if config.norm_before_fc else None,
        layer=_layer(loader, weights, config),
        hidden_norm=loader.vector("hidden_norm.weight", size) if eagle3 else None,
        norm=norm("norm.weight", size) if eagle3 else None,
        head=_head(weights, config, linears),
        target_ids=weights.target_ids(config),
    )
    weights.finish()
    return parts


def _head(weights: HeadTensors, config: EagleConfig, linears: LinearFactory) -> Linear | None:
    name = "lm_head.weight"
    if config.kind is EagleKind.EAGLE1:
        if name in weights:  # a copy of the target's
            weights.matrix(name, config.draft_vocab_size, config.hidden_size)
        return None
    return linears.stacked([weights.matrix(name, config.draft_vocab_size, config.hidden_size)], None)


def _layer(loader: LayerLoader, weights: HeadTensors, config: EagleConfig) -> Layer:
    size, eagle3 = config.hidden_size, config.kind is EagleKind.EAGLE3
    attention = "model.layers.0.self_attn."
    return Layer(
        input_norm=loader.vector("input_layernorm.weight", size) if eagle3 else torch.ones(size),
        attention=Attention(
            loader,
            qkv_bias=f"{attention}q_proj.bias" in weights,
            output_bias=f"{attention}o_proj.bias" in weights,
            head_norms=f"{attention}q_norm.weight" in weights,
            input_size=2 * size if eagle3 else size,
        ),
        mlp_norm=loader.vector("post_attention_layernorm.weight", size),
        mlp=GatedMlp(loader),
    )


def _embedding(weights: HeadTensors, config: EagleConfig, target: Target) -> Tensor:
    name, shape = "embed_tokens.weight", (config.layer.vocab_size, config.hidden_size)
    if name in weights:
        own = dense(weights.matrix(name, *shape)).to(target.embedding)
        # Most heads carry a copy of the target's, which is as large as the rest of them.
        same = shape == tuple(target.embedding.shape) and torch.equal(own, target.embedding)
        return target.embedding if same or config.kind is EagleKind.EAGLE1 else own
    if config.hidden_size != target.config.hidden_size:
        raise ModelError(
            f"the head lacks the tensor {name}, and the model's embeddings have {target.config.hidden_size} elements "
            f"where the head's have {config.hidden_size}: the head's export is incomplete",
            field="speculative_model",
        )
    return target.embedding
