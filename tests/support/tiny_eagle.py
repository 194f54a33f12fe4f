"""Tiny random EAGLE heads in both published layouts, and the same heads computed with transformers' own modules."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from quire.engine.models.config import ModelConfig

DRAFT_VOCAB_SIZE = 100


@dataclass(frozen=True, slots=True)
class TinyEagle:
    """A head of `kind` ("eagle3", "eagle") as transformers' modules; `target_ids` int64 [DRAFT_VOCAB_SIZE]."""

    kind: str
    config: LlamaConfig
    modules: nn.ModuleDict
    target_ids: Tensor

    def hidden(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """The head's states for a whole sequence: embedded and hidden [length, size], causal, without pages."""
        length, layer = len(embedded), self.modules
        if self.kind == "eagle3":
            residual = hidden
            inputs = torch.cat((layer["input_layernorm"](embedded), layer["hidden_norm"](hidden)), -1)
        else:
            residual = inputs = layer["fc"](torch.cat((embedded, hidden), -1))
        positions = torch.arange(length).unsqueeze(0)
        rotations = LlamaRotaryEmbedding(self.config)(inputs.unsqueeze(0), positions)
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        attended, _ = layer["self_attn"](inputs.unsqueeze(0), position_embeddings=rotations, attention_mask=mask)
        residual = residual + attended[0]
        return residual + layer["mlp"](layer["post_attention_layernorm"](residual))


def tiny_eagle(target: ModelConfig, kind: str = "eagle3", *, seed: int = 0) -> TinyEagle:
    """A random head for `target`, norms included."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=target.num_heads,
        num_key_value_heads=target.num_kv_heads,
        head_dim=target.head_size,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    size = config.hidden_size
    attention = LlamaAttention(config, 0)
    modules: dict[str, nn.Module] = {
        "self_attn": attention,
        "mlp": LlamaMLP(config),
        "post_attention_layernorm": LlamaRMSNorm(size, 1e-5),
    }
    if kind == "eagle3":
        for name in "qkv":
            rows = getattr(attention, f"{name}_proj").out_features
            setattr(attention, f"{name}_proj", nn.Linear(2 * size, rows, bias=False))
        modules |= {
            "input_layernorm": LlamaRMSNorm(size, 1e-5),
            "hidden_norm": LlamaRMSNorm(size, 1e-5),
            "fc": nn.Linear(3 * size, size, bias=False),
            "norm": LlamaRMSNorm(size, 1e-5),
            "lm_head": nn.Linear(size, DRAFT_VOCAB_SIZE, bias=False),
        }
    else:
        modules["fc"] = nn.Linear(2 * size, size, bias=True)
    tree = nn.ModuleDict(modules).requires_grad_(False)
    for parameter in tree.parameters():
        parameter.normal_(0.0, 0.3)
    return TinyEagle(kind, config, tree, torch.randperm(target.vocab_size)[:DRAFT_VOCAB_SIZE].sort().values)


_TOP = ("fc", "norm", "lm_head")


def write_head(head: TinyEagle, folder: Path, layout: str, **settings: Any) -> Path:
    """Writes `head` to `folder` as `layout` ("safeail", "safeail pickled", "speculators") has it; returns that."""
    prefix = {
        ("eagle3", True): "midlayer.",
        ("eagle3", False): "layers.0.",
        ("eagle", True): "layers.0.",
        ("eagle", False): "transformer.",
    }[head.kind, layout.startswith("safeail")]
    tensors = {}
    for name, tensor in head.modules.state_dict().items():
        top = name.startswith(_TOP)
        tensors[name if top else prefix + name] = tensor
    layer = head.config.to_dict()
    layer = {name: layer[name] for name in _LAYER_SETTINGS} | {"model_type": "llama"}
    if head.kind == "eagle3":
        vocabulary = torch.arange(head.config.vocab_size)
        tensors["d2t"] = head.target_ids - torch.arange(DRAFT_VOCAB_SIZE)
        tensors["t2d"] = torch.isin(vocabulary, head.target_ids)
    if layout == "speculators":
        config = {
            "speculators_model_type": head.kind,
            "architectures": ["Eagle3Speculator" if head.kind == "eagle3" else "EagleSpeculator"],
            "transformer_layer_config": layer,
            "speculators_config": {"algorithm": head.kind},
        }
        tensors = {
            name.replace("fc.", "fusion_fc.") if head.kind == "eagle" else name: t for name, t in tensors.items()
        }
    else:
        config = layer
    if head.kind == "eagle3":
        config["draft_vocab_size"] = DRAFT_VOCAB_SIZE
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | settings))
    if layout == "safeail pickled":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


_LAYER_SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act",
)  # fmt: skip
