"""Reading a model from a Hugging Face folder: config.json and safetensors in one file or many shards, memory-mapped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quire.engine.models.config import ModelConfig
from quire.engine.models.weights import Checklist, LinearWeight
from quire.service.checkpoint.text import folder_eos_token_ids
from quire.service.errors import ModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Old exports carry this buffer, which is computed from the configuration.
_COMPUTED = "rotary_emb.inv_freq"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class FolderWeights:
    """An open folder; see `quire.engine.models.weights.Weights`."""

    def __init__(self, path: Path) -> None:
        self.config = _config(path)
        self._path = path
        self._shards: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in _files(path):
            try:
                shard: Any = safe_open(str(file), framework="pt")
                for name in shard.keys():  # noqa: SIM118  not a dict
                    part = shard.get_slice(name)
                    if part.get_dtype() not in _DTYPES:
                        raise ModelError(
                            f"the tensor {name} of {file} is of type {part.get_dtype()}: F32, F16 and BF16 are "
                            "supported; take the model's unquantized export or a GGUF file",
                            field="model",
                        )
                    if not name.endswith(_COMPUTED) and not (
                        name == "lm_head.weight" and self.config.tie_word_embeddings
                    ):
                        shapes[name] = tuple(part.get_shape())
                        self._shards[name] = shard
            except (OSError, SafetensorError) as error:
                raise ModelError(
                    f"{file} is not a readable safetensors file ({error}): download it again", field="model"
                ) from error
        self._checklist = Checklist(path, shapes)

    def vector(self, name: str, size: int) -> Tensor:
        """Float32 [size]."""
        return self._take(name, (size,)).to(torch.float32)

    def matrix(self, name: str, rows: int, columns: int) -> LinearWeight:
        """[rows, columns], in the type it is stored in."""
        return self._take(name, (rows, columns))

    def finish(self) -> None:
        """Raises ModelError if tensors are left that nobody asked for."""
        self._checklist.finish()

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self._checklist.take(name, shape)
        tensor: Tensor = self._shards[name].get_tensor(name)
        return tensor


def _files(path: Path) -> list[Path]:
    index = path / _INDEX
    if not index.is_file():
        if not (path / _SINGLE).is_file():
            raise ModelError(
                f"{path} holds neither {_SINGLE} nor {_INDEX}: save the model with transformers' save_pretrained(…)",
                field="model",
            )
        return [path / _SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} is not a readable index ({error}): download it again", field="model") from error
    return [path / name for name in names]


def _config(path: Path) -> ModelConfig:
    file = path / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        architecture = str(content["model_type"])
        num_heads, hidden_size = content["num_attention_heads"], content["hidden_size"]
        # transformers 5 gathers what it called rope_theta and rope_scaling before.
        rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
        config = ModelConfig(
            architecture=architecture,
            vocab_size=content["vocab_size"],
            hidden_size=hidden_size,
            intermediate_size=content["intermediate_size"],
            num_layers=content["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=content.get("num_key_value_heads") or num_heads,
            head_size=content.get("head_dim") or hidden_size // num_heads,
            max_model_len=content["max_position_embeddings"],
            rms_norm_eps=content["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or content.get("rope_theta", 10000.0),
            tie_word_embeddings=content.get("tie_word_embeddings", False),
            eos_token_ids=folder_eos_token_ids(path),
        )
    except KeyError as error:
        raise ModelError(
            f"{file} lacks {error.args[0]}: the model's export is incomplete or its architecture is not supported",
            field="model",
        ) from error
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{file} is not a readable configuration ({error}): download it again", field="model"
        ) from error
    _refuse_unsupported(file, content, rope)
    return config


def _refuse_unsupported(file: Path, content: dict[str, Any], rope: dict[str, Any]) -> None:
    wanted = {
        "attention_bias": (content.get("attention_bias", False), False),
        "mlp_bias": (content.get("mlp_bias", False), False),
        "hidden_act": (content.get("hidden_act", "silu"), "silu"),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "quantization_config": (content.get("quantization_config"), None),
    }
    for key, (found, supported) in wanted.items():
        if found != supported:
            raise ModelError(f"{file} has {key} = {found}: only {supported} is supported yet", field="model")
