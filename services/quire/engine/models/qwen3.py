"""Qwen3, dense (Yang et al., "Qwen3 Technical Report", 2025): Llama's layer with a norm over each head of queries and
keys, heads whose size is not the hidden size divided by their number, and Qwen2's windows.
"""

from __future__ import annotations

from dataclasses import replace

from quire.engine.models.config import ModelConfig, read_config
from quire.engine.models.layer import Attention, GatedMlp, Layer, LayerLoader
from quire.engine.models.settings import Settings
from quire.engine.models.windows import upper_windows

_HEAD_SIZE = 128  # where config.json says nothing


def configure(settings: Settings) -> ModelConfig:
    """Raises ModelError for a setting that can't be served."""
    config = read_config(settings, _HEAD_SIZE)
    return replace(config, windows=upper_windows(settings, config.num_layers))


def load_layer(loader: LayerLoader) -> Layer:
    """Queries and keys are normalized per head; biases and windows are options that no released model uses."""
    config = loader.config
    bias, window = config.attention_bias, config.windows[loader.index]
    return Layer(
        input_norm=loader.vector("input_layernorm.weight", config.hidden_size),
        attention=Attention(loader, qkv_bias=bias, output_bias=bias, head_norms=True, window=window),
        mlp_norm=loader.vector("post_attention_layernorm.weight", config.hidden_size),
        mlp=GatedMlp(loader),
    )
