"""A model's shape and conventions, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass

from quire.engine.models.rope import Rope, read_rope
from quire.engine.models.settings import Settings


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Filled from a Hugging Face config.json or from GGUF metadata; sizes are in elements."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_model_len: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    attention_bias: bool  # whether the products before and after attention add a vector
    windows: tuple[int, ...]  # per layer, how many tokens a query sees, its own among them; 0 is all
    eos_token_ids: tuple[int, ...]


def read_config(settings: Settings, default_head_size: int = 0) -> ModelConfig:
    """What all families state alike; no windows. `default_head_size` 0 is the hidden size divided by heads.

    Raises ModelError that names the setting that is missing or can't be served.
    """
    settings.require("hidden_act", "silu")
    if "quantization_config" in settings:
        raise settings.error("quantization_config", "take the model's unquantized export or a GGUF file")
    hidden_size, num_heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
    num_kv_heads = settings.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise settings.error("num_key_value_heads", f"must divide the number of heads, {num_heads}")
    if not default_head_size and "head_dim" not in settings and hidden_size % num_heads:
        raise settings.error("num_attention_heads", f"must divide the hidden size, {hidden_size}")
    head_size = settings.integer("head_dim", default_head_size or hidden_size // num_heads)
    if head_size % 2:
        raise settings.error("head_dim" if "head_dim" in settings else "hidden_size", "the head size must be even")
    # What would make it another model. Hugging Face's settings of these families have none of them; GGUF's may.
    settings.require("num_local_experts", 0)
    settings.require("v_head_dim", head_size)
    settings.require("rotary_dim", head_size)
    num_layers = settings.integer("num_hidden_layers")
    return ModelConfig(
        architecture=settings.text("model_type"),
        vocab_size=settings.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=settings.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        max_model_len=settings.integer("max_position_embeddings"),
        rms_norm_eps=settings.number("rms_norm_eps"),
        rope=read_rope(settings),
        tie_word_embeddings=settings.flag("tie_word_embeddings", False),
        attention_bias=settings.flag("attention_bias", False),
        windows=(0,) * num_layers,
        eos_token_ids=settings.eos_token_ids,
    )
