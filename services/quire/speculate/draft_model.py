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
from quire.kernels.rotary import rotary
from quire.service.errors import ModelError
from quire.speculate.target import FrozenTarget


@dataclass(slots=True)
class Unroll:
    """Keys and values of the steps so far, [batch, kv_heads, length, head_size] each.

    Row p of step 0 stands at position p, of step j at p + j: a draft made from p sees the target's tokens up to p,
    which step 0 holds, and the drafts made from p before it, row p of the steps between.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class DraftModel(nn.Module):
    """Parameters by the names of speculators' layout. `embedding` [vocab_size, hidden_size] is the target's, frozen."""

    embedding: Tensor
    target_ids: Tensor
    rotations: Tensor

    def __init__(self, config: EagleConfig, embedding: Tensor, target_ids: Tensor) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer.rms_norm_eps
        self.config = config
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
        fused: Tensor = self.fc(tapped)
        return fused

    def forward(self, token_ids: Tensor, hidden: Tensor, unroll: Unroll) -> Tensor:
        """The next step of `unroll`: token_ids int64 [batch, length], hidden [batch, length, hidden_size].

        In step j row p has the token at p + 1 + j, and the fused state of p or this function's result of the step
        before; the result, of hidden's shape, predicts the token at p + 2 + j.
        """
        step, length = len(unroll.keys), token_ids.shape[1]
        embedded = F.embedding(token_ids, self.embedding).to(hidden.dtype)
        stepped: Tensor = self.layers[0](embedded, hidden, self.rotations[step : step + length], unroll)
        return stepped

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden_size] → over draft tokens, [..., draft_vocab_size]."""
        logits: Tensor = self.lm_head(self.norm(hidden))
        return logits


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


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig, *, norm_before_residual: bool) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.norm_before_residual = norm_before_residual
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.hidden_norm = nn.RMSNorm(size, eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.mlp = _Mlp(config)

    def forward(self, embedded: Tensor, hidden: Tensor, rotations: Tensor, unroll: Unroll) -> Tensor:
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        residual = residual + self.self_attn(torch.cat((self.input_layernorm(embedded), normed), -1), rotations, unroll)
        summed: Tensor = residual + self.mlp(self.post_attention_layernorm(residual))
        return summed


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, self.head_size = config.hidden_size, config.head_size
        self.num_kv_heads, self.group = config.num_kv_heads, config.num_heads // config.num_kv_heads
        self.q_proj = nn.Linear(2 * size, config.num_heads * self.head_size, bias=False)
        self.k_proj = nn.Linear(2 * size, config.num_kv_heads * self.head_size, bias=False)
        self.v_proj = nn.Linear(2 * size, config.num_kv_heads * self.head_size, bias=False)
        self.o_proj = nn.Linear(config.num_heads * self.head_size, size, bias=False)

    def forward(self, x: Tensor, rotations: Tensor, unroll: Unroll) -> Tensor:
        batch, length, _ = x.shape
        cos, sin = rotations.unsqueeze(2).unbind(1)

        def heads(y: Tensor, turned: bool) -> Tensor:
            y = y.view(batch, length, -1, self.head_size)
            return (rotary(y, cos, sin).to(y.dtype) if turned else y).transpose(1, 2)

        unroll.keys.append(heads(self.k_proj(x), True))
        unroll.values.append(heads(self.v_proj(x), False))
        queries = heads(self.q_proj(x), True)
        attended = self._causal(queries, unroll) if len(unroll.keys) == 1 else self._with_drafts(queries, unroll)
        output: Tensor = self.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))
        return output

    def _causal(self, queries: Tensor, unroll: Unroll) -> Tensor:
        return F.scaled_dot_product_attention(
            queries, unroll.keys[0], unroll.values[0], is_causal=True, enable_gqa=self.group > 1
        )

    def _with_drafts(self, queries: Tensor, unroll: Unroll) -> Tensor:
        batch, _, length, _ = queries.shape
        # The heads that share keys are the rows of one product.
        grouped = queries.reshape(batch, self.num_kv_heads, self.group * length, self.head_size)
        unseen = torch.ones(length, length, dtype=torch.bool, device=queries.device).triu(1).repeat(self.group, 1)
        scores = (grouped @ unroll.keys[0].transpose(-1, -2)).masked_fill(unseen, -torch.inf)
        by_head = grouped.view(batch, self.num_kv_heads, self.group, length, self.head_size)
        drafts = torch.stack([(by_head * keys.unsqueeze(2)).sum(-1).flatten(2, 3) for keys in unroll.keys[1:]], -1)
        # Rows of other lengths than a multiple of 8 keep a GPU's matrix units from them.
        drafts = F.pad(drafts, (0, -drafts.shape[-1] % 8), value=-torch.inf)
        scores = torch.cat((scores, drafts), -1) / math.sqrt(self.head_size)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(queries.dtype)
        attended = (weights[..., :length] @ unroll.values[0]).view_as(by_head)
        shares = weights[..., length:].view(*by_head.shape[:-1], -1)
        for step, values in enumerate(unroll.values[1:]):
            attended = attended + shares[..., step, None] * values.unsqueeze(2)
        return attended.reshape(queries.shape)


class _Mlp(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output
