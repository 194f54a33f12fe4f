"""What a head is made of, read from config.json in either published layout and checked against the target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from quire.engine.models.config import ModelConfig, read_config
from quire.engine.models.safetensors import settings_of
from quire.service.errors import ModelError


class EagleKind(Enum):
    """The values are speculators' `speculators_model_type`. EAGLE-2 uses heads of EAGLE-1."""

    EAGLE1 = "eagle"
    EAGLE3 = "eagle3"


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """`layer` describes the head's one layer; its vocab_size and max_model_len are the target's.

    `taps` are the layers of the target whose input, the residual stream, the head reads; the number of the target's
    layers stands for its hidden state after the final norm, which alone EAGLE-1 reads.
    """

    kind: EagleKind
    layer: ModelConfig
    target_hidden_size: int
    taps: tuple[int, ...]
    draft_vocab_size: int
    norm_before_residual: bool = False  # the residual around attention is the normalized hidden state
    norm_before_fc: bool = False  # the tapped states are normalized as one vector before they are fused

    @property
    def hidden_size(self) -> int:
        """The head's own."""
        return self.layer.hidden_size

    @property
    def fused_size(self) -> int:
        """Elements of the tapped states of one token."""
        return len(self.taps) * self.target_hidden_size


# What Hugging Face's LlamaConfig assumes: speculators leaves out of a file what equals it.
_LLAMA_DEFAULTS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
# Whose layers a head may have: they differ in what `quire.engine.speculation.eagle.parts` sees by the tensors.
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# The tensor that tells an EAGLE-3 head from others where its configuration does not.
EAGLE3_ONLY = "model.layers.0.hidden_norm.weight"


def default_taps(num_layers: int) -> tuple[int, int, int]:
    """EAGLE-3's published choice: a low, a middle and a high layer."""
    return min(2, num_layers - 1), num_layers // 2, max(0, num_layers - 3)


def read_eagle_config(file: Path, values: dict[str, Any], tensors: Iterable[str], target: ModelConfig) -> EagleConfig:
    """From `values`, what stands in `file`, and the names of the checkpoint's tensors as `checkpoint` gives them.

    Raises ModelError that names the setting at fault, or what does not fit the target.
    """
    speculators = values.get("speculators_model_type")
    if speculators is not None:
        kind = _kind(file, speculators)
        nested = values.get("transformer_layer_config")
        layer_values = _LLAMA_DEFAULTS | (nested if isinstance(nested, dict) else {})
    else:
        kind = EagleKind.EAGLE3 if EAGLE3_ONLY in tensors else EagleKind.EAGLE1
        layer_values = values
    num_layers = layer_values.get("num_hidden_layers", 1)
    if kind is EagleKind.EAGLE3 and num_layers != 1:
        raise _error(file, "num_hidden_layers", num_layers, "only heads of 1 layer are supported")
    for name in ("layernorms", "add_para_norm"):
        if values.get(name):
            raise _error(file, name, values[name], "only false is supported")
    settings = settings_of(file, layer_values | {"num_hidden_layers": 1, "tie_word_embeddings": False})
    if settings.text("model_type", "llama") not in _FAMILIES:
        raise settings.error("model_type", f"the head's layer must be of one of {', '.join(_FAMILIES)}")
    layer = read_config(settings)
    config = EagleConfig(
        kind,
        replace(layer, max_model_len=target.max_model_len),
        target_hidden_size=_integer(file, values, "target_hidden_size", layer.hidden_size),
        taps=_taps(file, values, target) if kind is EagleKind.EAGLE3 else (target.num_layers,),
        draft_vocab_size=_integer(file, values, "draft_vocab_size", layer.vocab_size),
        norm_before_residual=values.get("norm_before_residual") is True,
        norm_before_fc=values.get("norm_before_fc") is True,
    )
    _check(file, config, target)
    return config


def _check(file: Path, config: EagleConfig, target: ModelConfig) -> None:
    for name, found, wanted in (
        ("vocab_size", config.layer.vocab_size, target.vocab_size),
        ("target_hidden_size", config.target_hidden_size, target.hidden_size),
    ):
        if found != wanted:
            raise _error(file, name, found, f"the model has {wanted}: take the head that was trained for this model")
    if config.kind is EagleKind.EAGLE1 and config.hidden_size != target.hidden_size:
        raise _error(file, "hidden_size", config.hidden_size, f"the model has {target.hidden_size}")
    if config.draft_vocab_size > target.vocab_size:
        raise _error(
            file, "draft_vocab_size", config.draft_vocab_size, f"the model's vocabulary has {target.vocab_size} tokens"
        )


def _kind(file: Path, name: object) -> EagleKind:
    try:
        return EagleKind(name)
    except ValueError as error:
        known = " and ".join(kind.value for kind in EagleKind)
        raise _error(file, "speculators_model_type", name, f"supported are {known}") from error


def _taps(file: Path, values: dict[str, Any], target: ModelConfig) -> tuple[int, ...]:
    name = "eagle_aux_hidden_state_layer_ids"
    nested = values.get("eagle_config")
    given = values.get(name) or (nested.get(name) if isinstance(nested, dict) else None)
    if given is None:
        return default_taps(target.num_layers)
    if not isinstance(given, list) or not all(isinstance(tap, int) and 0 <= tap < target.num_layers for tap in given):
        raise _error(file, name, given, f"give a list of layers of the model, 0 to {target.num_layers - 1}")
    return tuple(given)


def _integer(file: Path, values: dict[str, Any], name: str, default: int) -> int:
    value = values.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _error(file, name, value, "must be a positive integer")
    return value


def _error(file: Path, name: str, value: object, problem: str) -> ModelError:
    return ModelError(f"{file} has {name} = {value!r}: {problem}", field="speculative_model")
