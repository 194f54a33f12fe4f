"""Llama 1 to 3 (Touvron et al., 2023; Grattafiori et al., "The Llama 3 Herd of Models", 2024), and models of the same
shape such as SmolLM2. Queries are grouped from Llama 2 on; Llama 3.1 stretches its rotary frequencies.
"""

from __future__ import annotations

from quire.engine.models.config import ModelConfig, read_config
from quire.engine.models.layer import Attention, GatedMlp, Layer, LayerLoader
from quire.engine.models.settings import Settings


def configure(settings: Settings) -> ModelConfig:
    """Raises ModelError for a setting that can't be served."""
    settings.require("mlp_bias", False)
    return read_config(settings)


def load_layer(loader: LayerLoader) -> Layer:
    """Nothing is special but that there may be biases around attention, which a few descendants have."""
    config = loader.config
    return Layer(
        input_norm=loader.vector("input_layernorm.weight", config.hidden_size),
        attention=Attention(loader, qkv_bias=config.attention_bias, output_bias=config.attention_bias),
        mlp_norm=loader.vector("post_attention_layernorm.weight", config.hidden_size),
        mlp=GatedMlp(loader),
    )
