"""Mistral 7B and its dense descendants (Jiang et al., "Mistral 7B", 2023): Llama's layer, in which a query of the first
release sees the last 4,096 tokens only. Later releases see all.

llama.cpp's converter calls these models "llama" and leaves the window out: a GGUF file of the first release attends to
all tokens, there as here.
"""

from __future__ import annotations

from dataclasses import replace

from quire.engine.models.config import ModelConfig, read_config
from quire.engine.models.layer import Attention, GatedMlp, Layer, LayerLoader
from quire.engine.models.settings import Settings


def configure(settings: Settings) -> ModelConfig:
    """Raises ModelError for a setting that can't be served."""
    config = read_config(settings)
    if "sliding_window" not in settings:
        return config
    return replace(config, windows=(settings.integer("sliding_window"),) * config.num_layers)


def load_layer(loader: LayerLoader) -> Layer:
    """Attention has a window."""
    config = loader.config
    return Layer(
        input_norm=loader.vector("input_layernorm.weight", config.hidden_size),
        attention=Attention(loader, window=config.windows[loader.index]),
        mlp_norm=loader.vector("post_attention_layernorm.weight", config.hidden_size),
        mlp=GatedMlp(loader),
    )
