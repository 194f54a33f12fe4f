"""Qwen2 and Qwen2.5, dense (Yang et al., "Qwen2 Technical Report", 2024): Llama's layer with biases on queries, keys
and values, and if `use_sliding_window` a window in the layers from `max_window_layers` on.
"""

from __future__ import annotations

from dataclasses import replace

from quire.engine.models.config import ModelConfig, read_config
from quire.engine.models.layer import Attention, GatedMlp, Layer, LayerLoader
from quire.engine.models.settings import Settings
from quire.engine.models.windows import upper_windows


def configure(settings: Settings) -> ModelConfig:
    """Raises ModelError for a setting that can't be served."""
    config = read_config(settings)
    return replace(config, windows=upper_windows(settings, config.num_layers))


def load_layer(loader: LayerLoader) -> Layer:
    """Queries, keys and values have biases; attention may have a window."""
    config = loader.config
    return Layer(
        input_norm=loader.vector("input_layernorm.weight", config.hidden_size),
        attention=Attention(loader, qkv_bias=True, window=config.windows[loader.index]),
        mlp_norm=loader.vector("post_attention_layernorm.weight", config.hidden_size),
        mlp=GatedMlp(loader),
    )
