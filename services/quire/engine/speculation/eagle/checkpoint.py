"""Heads on disk: SafeAILab/EAGLE's layout and vllm-project/speculators' are read, the latter is written.

Both are a folder with config.json and one file of tensors. They differ in what they call the parts:

| here | SafeAILab | speculators |
|---|---|---|
| model.layers.0.… | midlayer.… (EAGLE-3), layers.0.… (EAGLE-1) | layers.0.… (eagle3), transformer.… (eagle) |
| fc.… | fc.… | fc.… (eagle3), fusion_fc.… (eagle) |

`d2t` int64 [draft_vocab_size] holds, for each draft token, the target's token less its own number; `t2d` bool
[vocab_size] says which of the target's tokens have one.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire.engine.models.config import ModelConfig
from quire.engine.models.rope import Rope
from quire.engine.models.safetensors import read_json_object
from quire.engine.models.weights import Checklist, LinearWeight, Tensors
from quire.engine.speculation.eagle.config import EagleConfig, EagleKind, read_eagle_config
from quire.service.errors import ConfigError, ModelError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_PICKLED_FILE = "pytorch_model.bin"
_LAYER = "model.layers.0."
_PREFIXES = {"midlayer.": _LAYER, "layers.0.": _LAYER, "transformer.": _LAYER, "fusion_fc.": "fc."}
# Buffers, and what training keeps beside the head.
_IGNORED = ("rotary_emb.inv_freq", "verifier_norm.weight", "verifier_lm_head.weight")


class HeadTensors(Tensors, Protocol):
    """A head's tensors by the names above."""

    def __contains__(self, name: str) -> bool: ...

    def target_ids(self, config: EagleConfig) -> Tensor | None:
        """The target's token of each draft token, int64 [draft_vocab_size]; None if they are the same ones."""

    def finish(self) -> None:
        """Raises ModelError if tensors are left that nobody asked for."""


class EagleWeights:
    """`HeadTensors` of a checkpoint."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self._path = path
        self._tensors = dict(tensors)
        self._checklist = Checklist(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()})

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def vector(self, name: str, size: int) -> Tensor:
        """Float32 [size]; raises ModelError."""
        return self._take(name, (size,)).to(torch.float32)

    def matrix(self, name: str, rows: int, columns: int) -> LinearWeight:
        """[rows, columns], in the type it is stored in; raises ModelError."""
        return self._take(name, (rows, columns))

    def target_ids(self, config: EagleConfig) -> Tensor | None:
        """The target's token of each draft token, int64 [draft_vocab_size]; None if they are the same ones.

        Raises ModelError if the mapping is missing or contradicts itself.
        """
        size, vocab_size = config.draft_vocab_size, config.layer.vocab_size
        if size == vocab_size and "d2t" not in self:
            return None
        self._checklist.take("d2t", (size,))
        offsets = self._tensors["d2t"]
        ids = torch.arange(size) + offsets.to(torch.int64)
        if offsets.is_floating_point() or ids.min() < 0 or ids.max() >= vocab_size or len(set(ids.tolist())) != size:
            raise self._error("d2t", f"it must map {size} draft tokens to as many of the model's {vocab_size}")
        if "t2d" in self:
            self._checklist.take("t2d", (vocab_size,))
            if not torch.equal(self._tensors["t2d"].nonzero().flatten(), ids.sort().values):
                raise self._error("t2d", "it names other tokens than d2t does")
        return ids

    def finish(self) -> None:
        """Raises ModelError if tensors are left that nobody asked for."""
        self._checklist.finish()

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self._checklist.take(name, shape)
        tensor = self._tensors[name]
        if not tensor.is_floating_point():
            raise self._error(name, f"it is of type {tensor.dtype}, and only unquantized heads are supported")
        return tensor

    def _error(self, name: str, problem: str) -> ModelError:
        return ModelError(f"the tensor {name} of {self._path}: {problem}", field="speculative_model")


@dataclass(frozen=True, slots=True)
class EagleCheckpoint:
    """An open head that fits the target."""

    config: EagleConfig
    weights: HeadTensors


def config_file(path: Path) -> Path:
    """The configuration of the head in the folder `path`; raises ModelError if there is none."""
    file = path / CONFIG_FILE
    if not file.is_file():
        raise ModelError(f"{path} holds no {CONFIG_FILE}: name the folder of an EAGLE head", field="speculative_model")
    return file


def open_eagle(path: Path, target: ModelConfig) -> EagleCheckpoint:
    """Opens the head in the folder `path`; raises ModelError that says what is wrong with it."""
    file = config_file(path)
    tensors = _named(_read_tensors(path))
    config = read_eagle_config(file, read_json_object(file), tensors, target)
    return EagleCheckpoint(config, EagleWeights(path, tensors))


def write_eagle3(
    path: Path, config: EagleConfig, tensors: Mapping[str, Tensor], target_ids: Tensor, verifier: str
) -> None:
    """Writes an EAGLE-3 head to the folder `path` in speculators' layout, which vLLM loads too.

    `tensors` have that layout's names and no mapping; `target_ids` int64 [draft_vocab_size], ascending. `verifier` is
    what the target is called. Raises ConfigError if the folder can't be written.
    """
    if config.kind is not EagleKind.EAGLE3:
        raise ConfigError("only EAGLE-3 heads are written", field="speculative_model")
    known = torch.zeros(config.layer.vocab_size, dtype=torch.bool)
    known[target_ids] = True
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    stored["d2t"] = target_ids - torch.arange(config.draft_vocab_size)
    stored["t2d"] = known
    try:
        path.mkdir(parents=True, exist_ok=True)
        # The configuration last: a folder with one is whole.
        save_file(stored, path / WEIGHTS_FILE, metadata={"format": "pt"})
        (path / CONFIG_FILE).write_text(json.dumps(_to_json(config, verifier), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} can't be written ({error.strerror}): name another folder", field="output") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    safetensors, pickled = path / WEIGHTS_FILE, path / _PICKLED_FILE
    try:
        if safetensors.is_file():
            return load_file(safetensors)
        if pickled.is_file():
            loaded = torch.load(pickled, map_location="cpu", weights_only=True)
            if isinstance(loaded, dict) and all(isinstance(tensor, Tensor) for tensor in loaded.values()):
                return loaded
            raise ModelError(f"{pickled} holds no tensors by name: download it again", field="speculative_model")
    except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"the tensors in {path} can't be read ({error}): download them again", field="speculative_model"
        ) from error
    raise ModelError(f"{path} holds neither {WEIGHTS_FILE} nor {_PICKLED_FILE}", field="speculative_model")


def _named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith(_IGNORED):
            prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
            found[_PREFIXES.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return found


def _to_json(config: EagleConfig, verifier: str) -> dict[str, Any]:
    layer = config.layer
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": EagleKind.EAGLE3.value,
        "speculators_version": "0.2.0",
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "eagle_aux_hidden_state_layer_ids": list(config.taps),
        "tie_word_embeddings": False,
        "transformer_layer_config": {
            "model_type": "llama",
            "vocab_size": layer.vocab_size,
            "hidden_size": layer.hidden_size,
            "intermediate_size": layer.intermediate_size,
            "num_hidden_layers": 1,
            "num_attention_heads": layer.num_heads,
            "num_key_value_heads": layer.num_kv_heads,
            "head_dim": layer.head_size,
            "hidden_act": "silu",
            "max_position_embeddings": layer.max_model_len,
            "rms_norm_eps": layer.rms_norm_eps,
            "attention_bias": False,
            "mlp_bias": False,
            "rope_theta": _plain_theta(layer.rope),
        },
        "speculators_config": {
            "algorithm": EagleKind.EAGLE3.value,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
            "verifier": {"name_or_path": verifier, "architectures": []},
        },
    }


def _plain_theta(rope: Rope) -> float:
    if rope.scaling is not None:
        raise ConfigError("a head whose rotary frequencies are stretched can't be written", field="speculative_model")
    return rope.theta
