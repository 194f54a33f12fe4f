"""From a checkpoint to a model that runs: the one way in for the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from quire.engine.models import llama, mistral, qwen2, qwen3
from quire.engine.models.config import ModelConfig
from quire.engine.models.decoder import Decoder
from quire.engine.models.dummy import DummyWeights
from quire.engine.models.gpu_decoder import GpuDecoder
from quire.engine.models.layer import Layer, LayerLoader
from quire.engine.models.model import ModelDtype
from quire.engine.models.safetensors import FolderWeights
from quire.engine.models.settings import Settings
from quire.engine.models.weights import Weights
from quire.engine.parallel.group import Group
from quire.engine.parallel.shards import ShardedWeights
from quire.service.checkpoint.locate import CheckpointFormat
from quire.service.errors import ModelError

Progress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class Family:
    """What tells one family of models from another: how it reads its settings and what its layers are made of."""

    configure: Callable[[Settings], ModelConfig]
    load_layer: Callable[[LayerLoader], Layer]


# By config.json's model_type, which is GGUF's general.architecture.
FAMILIES = {
    "llama": Family(llama.configure, llama.load_layer),
    "mistral": Family(mistral.configure, mistral.load_layer),
    "qwen2": Family(qwen2.configure, qwen2.load_layer),
    "qwen3": Family(qwen3.configure, qwen3.load_layer),
}


def load_model(
    path: Path, format: CheckpointFormat, dtype: ModelDtype, progress: Progress, *, dummy: bool = False
) -> Decoder:
    """The model at `path`, its weights in memory. `progress` is called with 0 to 1 and what is being done.

    `dummy` makes random weights for a folder with config.json.
    Raises ModelError if the architecture is not supported, a setting can't be served, or a tensor is missing, left over
    or misshapen.
    """
    made = _dummy(path, format, dtype, torch.device("cpu")) if dummy else None
    weights, config, family = open_weights(path, format, progress, made)
    model = Decoder(weights, config, family.load_layer, dtype, lambda done: progress(done, _activity(made)))
    weights.finish()
    return model


def load_gpu_model(
    path: Path,
    format: CheckpointFormat,
    dtype: ModelDtype,
    device: torch.device,
    progress: Progress,
    *,
    dummy: bool = False,
    kv_dtype: torch.dtype | None = None,
    group: Group | None = None,
) -> GpuDecoder:
    """As `load_model`, for a GPU; `kv_dtype` of keys and values is the model's, or FP8. In a group it is this rank's
    part of the model.

    Raises ModelError if the GPU's memory does not suffice, too.
    """
    made = _dummy(path, format, dtype, device) if dummy else None
    weights, config, family = open_weights(path, format, progress, made)
    if group is not None:
        weights, config = ShardedWeights(weights, config, group.shard), group.shard.config(config)
    activity = _activity(made)
    model = GpuDecoder(
        weights, config, family.load_layer, dtype, device, lambda done: progress(done, activity), kv_dtype, group
    )
    weights.finish()
    return model


def open_weights(
    path: Path, format: CheckpointFormat, progress: Progress, made: Weights | None = None
) -> tuple[Weights, ModelConfig, Family]:
    """A checkpoint without its tensors being read; `made` takes its place. Raises ModelError as `load_model` does."""
    progress(0.0, f"reading {path.name}")
    weights = made
    if weights is None:
        weights = _gguf(path) if format is CheckpointFormat.GGUF else FolderWeights(path)
    family = FAMILIES.get(weights.settings.text("model_type"))
    if family is None:
        raise weights.settings.error("model_type", f"supported are {', '.join(FAMILIES)}")
    return weights, family.configure(weights.settings), family


def _dummy(path: Path, format: CheckpointFormat, dtype: ModelDtype, device: torch.device) -> Weights | None:
    """None for a file, which has its weights in it."""
    if format is not CheckpointFormat.FOLDER:
        return None
    return DummyWeights(path, device, torch.float32 if dtype is ModelDtype.FLOAT32 else torch.bfloat16)


def _activity(made: Weights | None) -> str:
    return "loading weights" if made is None else "making random weights"


def _gguf(path: Path) -> Weights:
    # The offline API runs without the package, as long as nobody names such a file.
    try:
        from quire.engine.models.gguf import GgufWeights
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ModelError(
            f"{path} is a GGUF file, and the package that reads its tensors is missing: run `pip install gguf`",
            field="model",
        ) from error
    return GgufWeights(path)
