"""An EAGLE-3 head as it is trained: over whole sequences, unrolled for several steps, without pages.

The same function as `quire.engine.speculation.eagle.head.EagleHead`, with gradients. Training-time test: Li et al.,
"EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test", 2025, section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from quire.engine.models.config import ModelConfig
from quire.engine.models.decoder import rotary_frequencies_table
from quire.engine.models.weights import dense
from quire.engine.speculation.eagle.checkpoint import open_eagle
from quire.engine.speculation.eagle.config import EagleConfig, EagleKind
from quire.service.errors import ModelError
from quire.speculate.draft_attention import attend_with_drafts, can_attend
from quire.speculate.fused_layer import added_and_normed, both_normed, gated, no_planned_attention, normed, turned_heads
from quire.speculate.target import FrozenTarget


@dataclass(slots=True)
class Unroll:
    """Keys and values of the steps so far, [batch, length, kv_heads, head_size] each.

    Row p of step 0 stands at position p, of step j at p + j: a draft made from p sees the target's tokens up to p,
    which step 0 holds, and the drafts made from p before it, row p of the steps between.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class DraftModel(nn.Module):
    """Parameters by the names of speculators' layout. `embedding` [vocab_size, hidden_size] is the target's, frozen.

    Not `fused`, scores of attention and logits are computed as a textbook has it, and kept for their gradients.
    """

    embedding: Tensor
    target_ids: Tensor
    rotations: Tensor

    def __init__(self, config: EagleConfig, embedding: Tensor, target_ids: Tensor) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer.rms_norm_eps
        self.config = config
        self.fused = True
        self.fc = nn.Linear(config.fused_size, size, bias=False)
        self.layers = nn.ModuleList([_Layer(config.layer, norm_before_residual=config.norm_before_residual)])
        self.norm = nn.RMSNorm(size, eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("target_ids", target_ids, persistent=False)
        rotations = rotary_frequencies_table(config.layer, None).squeeze(2)
        self.register_buffer("rotations", rotations, persistent=False)

    def fuse(self, tapped: Tensor) -> Tensor:
        """The target's states at `config.taps`, [batch, length, fused_size] → [batch, length, hidden_size]."""
        fused: Tensor = self.fc(tapped.to(_product_dtype(self.fc.weight)))
        return fused.to(self.fc.weight.dtype)

    def forward(self, token_ids: Tensor, hidden: Tensor, unroll: Unroll) -> Tensor:
        """The next step of `unroll`: token_ids int64 [batch, length], hidden [batch, length, hidden_size].

        In step j row p has the token at p + 1 + j, and the fused state of p or this function's result of the step
        before; the result, of hidden's shape, predicts the token at p + 2 + j.
        """
        step, (batch, length) = len(unroll.keys), token_ids.shape
        embedded = F.embedding(token_ids.flatten(), self.embedding)
        positions = torch.arange(step, step + length, device=token_ids.device).repeat(batch)
        turn = _Turn(positions, self.rotations)
        stepped: Tensor = self.layers[0](embedded, hidden.flatten(0, 1), turn, unroll, (batch, length), self.fused)
        return stepped.view_as(hidden)

    def normed(self, hidden: Tensor) -> Tensor:
        """What goes into the head's last product: hidden of any rows, [T, hidden_size]."""
        return normed(hidden, self.norm.weight, self.config.layer.rms_norm_eps, _product_dtype(self.norm.weight))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden_size] → over draft tokens, [..., draft_vocab_size]."""
        logits: Tensor = self.lm_head(self.normed(hidden.flatten(0, -2)))
        return logits.view(*hidden.shape[:-1], -1)


def load_draft_model(path: Path, target: FrozenTarget) -> DraftModel:
    """The EAGLE-3 head in the folder `path`, on the target's device, in float32.

    Raises ModelError for a head that can't be loaded, or is of another kind.
    """
    checkpoint = open_eagle(path, target.config)
    config, weights = checkpoint.config, checkpoint.weights
    if config.kind is not EagleKind.EAGLE3 or config.norm_before_fc:
        raise ModelError(f"{path} holds a head that the engine serves and this command does not know", field="head")
    embedding = target.embedding
    if "embed_tokens.weight" in weights:
        embedding = dense(weights.matrix("embed_tokens.weight", config.layer.vocab_size, config.hidden_size))
    ids = weights.target_ids(config)
    model = DraftModel(config, embedding, torch.arange(config.draft_vocab_size) if ids is None else ids)
    loaded = {}
    for name, tensor in model.state_dict().items():
        stored = name.replace("layers.0.", "model.layers.0.", 1)
        shape = tuple(tensor.shape)
        loaded[name] = weights.vector(stored, *shape) if len(shape) == 1 else dense(weights.matrix(stored, *shape))
    weights.finish()
    model.load_state_dict(loaded)
    return model.to(target.device)


@dataclass(frozen=True, slots=True)
class _Turn:
    positions: Tensor  # int64 [T], each row's
    rotations: Tensor  # [max_model_len, 2, head_size]


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig, *, norm_before_residual: bool) -> None:
        super().__init__()
        size, self.eps = config.hidden_size, config.rms_norm_eps
        self.norm_before_residual = norm_before_residual
        self.input_layernorm = nn.RMSNorm(size, self.eps)
        self.hidden_norm = nn.RMSNorm(size, self.eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(size, self.eps)
        self.mlp = _Mlp(config)

    def forward(
        self, embedded: Tensor, hidden: Tensor, turn: _Turn, unroll: Unroll, shape: tuple[int, int], fused: bool
    ) -> Tensor:
        """embedded and hidden [batch × length, hidden_size]; `shape` is batch and length."""
        dtype = _product_dtype(hidden)
        first, second = self.input_layernorm.weight, self.hidden_norm.weight
        x = both_normed(embedded, hidden, first, second, self.eps, dtype)
        residual = x[:, embedded.shape[1] :] if self.norm_before_residual else hidden
        attended = self.self_attn(x, turn, unroll, shape, fused)
        weight = self.post_attention_layernorm.weight
        residual, x = added_and_normed(residual, attended, weight, self.eps, dtype)
        summed: Tensor = residual + self.mlp(x)
        return summed.to(hidden.dtype)


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, self.head_size = config.hidden_size, config.head_size
        self.num_kv_heads, self.group = config.num_kv_heads, config.num_heads // config.num_kv_heads
        self.q_proj = nn.Linear(2 * size, config.num_heads * self.head_size, bias=False)
        self.k_proj = nn.Linear(2 * size, config.num_kv_heads * self.head_size, bias=False)
        self.v_proj = nn.Linear(2 * size, config.num_kv_heads * self.head_size, bias=False)
        self.o_proj = nn.Linear(config.num_heads * self.head_size, size, bias=False)

    def forward(self, x: Tensor, turn: _Turn, unroll: Unroll, shape: tuple[int, int], fused: bool) -> Tensor:
        qkv = F.linear(x, torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)))
        num_heads = self.num_kv_heads * self.group
        heads = turned_heads(qkv, turn.positions, turn.rotations, num_heads, None, 0.0)
        queries, keys, values = (tensor.view(*shape, *tensor.shape[1:]) for tensor in heads)
        unroll.keys.append(keys)
        unroll.values.append(values)
        if len(unroll.keys) == 1:
            attended = self._causal(queries, keys, values)
        elif fused and can_attend(queries):
            attended = attend_with_drafts(queries, unroll.keys, unroll.values)
        else:
            attended = self._with_drafts(queries, unroll)
        output: Tensor = self.o_proj(attended.flatten(2).flatten(0, 1))
        return output

    def _causal(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        queries, keys, values = (tensor.transpose(1, 2) for tensor in (queries, keys, values))
        with no_planned_attention():
            attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=self.group > 1)
        return attended.transpose(1, 2)

    def _with_drafts(self, queries: Tensor, unroll: Unroll) -> Tensor:
        batch, length, *_ = queries.shape
        # The heads that share keys are the rows of one product.
        by_head = queries.view(batch, length, self.num_kv_heads, self.group, -1).permute(0, 2, 3, 1, 4)
        grouped = by_head.reshape(batch, self.num_kv_heads, self.group * length, self.head_size)
        all_keys = [keys.transpose(1, 2) for keys in unroll.keys]
        all_values = [values.transpose(1, 2) for values in unroll.values]
        unseen = torch.ones(length, length, dtype=torch.bool, device=queries.device).triu(1).repeat(self.group, 1)
        scores = (grouped @ all_keys[0].transpose(-1, -2)).masked_fill(unseen, -torch.inf)
        drafts = torch.stack([(by_head * keys.unsqueeze(2)).sum(-1).flatten(2, 3) for keys in all_keys[1:]], -1)
        scores = torch.cat((scores, drafts), -1) / math.sqrt(self.head_size)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(queries.dtype)
        attended = (weights[..., :length] @ all_values[0]).view_as(by_head)
        shares = weights[..., length:].view(*by_head.shape[:-1], -1)
        for step, values in enumerate(all_values[1:]):
            attended = attended + shares[..., step, None] * values.unsqueeze(2)
        return attended.permute(0, 3, 1, 2, 4).flatten(2, 3)


class _Mlp(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = F.linear(x, torch.cat((self.gate_proj.weight, self.up_proj.weight)))
        output: Tensor = self.down_proj(gated(gate_up))
        return output


def _product_dtype(x: Tensor) -> torch.dtype:
    """The type of products with what has x's type, under autocast or not."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
