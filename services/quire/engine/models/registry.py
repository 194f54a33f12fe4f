"""From a checkpoint to a model that runs: the one way in for the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from quire.engine.models.gguf import GgufWeights
from quire.engine.models.llama import Llama
from quire.engine.models.model import Model, ModelDtype
from quire.engine.models.safetensors import FolderWeights
from quire.engine.models.weights import Weights
from quire.service.checkpoint.locate import CheckpointFormat
from quire.service.errors import ModelError

Progress = Callable[[float, str], None]

# By the name that config.json's model_type and GGUF's general.architecture have in common.
_ARCHITECTURES = {"llama": Llama}


def load_model(path: Path, format: CheckpointFormat, dtype: ModelDtype, progress: Progress) -> Model:
    """The model at `path`, its weights in memory. `progress` is called with 0 to 1 and what is being done.

    Raises ModelError if the architecture is not supported, or a tensor is missing, left over or misshapen.
    """
    progress(0.0, f"reading {path.name}")
    weights: Weights = GgufWeights(path) if format is CheckpointFormat.GGUF else FolderWeights(path)
    architecture = _ARCHITECTURES.get(weights.config.architecture)
    if architecture is None:
        raise ModelError(
            f"{path} is of the architecture {weights.config.architecture}; supported: {', '.join(_ARCHITECTURES)}",
            field="model",
        )
    model = architecture(weights, dtype, lambda done: progress(done, "loading weights"))
    weights.finish()
    return model
