"""A head of random weights for a folder that has only config.json, in either published layout: see `models.dummy`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quire.engine.models.config import ModelConfig
from quire.engine.models.dummy import DummyWeights
from quire.engine.models.safetensors import read_json_object
from quire.engine.speculation.eagle.checkpoint import EagleCheckpoint, config_file
from quire.engine.speculation.eagle.config import EAGLE3_ONLY, EagleConfig, read_eagle_config


class DummyEagleWeights(DummyWeights):
    """`quire.engine.speculation.eagle.checkpoint.HeadTensors`, of which those that a head may lack are not there."""

    def __contains__(self, name: str) -> bool:
        return False

    def target_ids(self, config: EagleConfig) -> Tensor | None:
        """The first of the target's tokens are those that can be drafted."""
        size = config.draft_vocab_size
        return None if size == config.layer.vocab_size else torch.arange(size)


def dummy_eagle(path: Path, target: ModelConfig, device: torch.device, dtype: torch.dtype) -> EagleCheckpoint:
    """A head as config.json in the folder `path` describes it; raises ModelError that names the setting at fault.

    Where it does not say which kind it is, it is EAGLE-3 if it has a vocabulary of its own.
    """
    file = config_file(path)
    values = read_json_object(file)
    tensors = (EAGLE3_ONLY,) if "draft_vocab_size" in values else ()
    return EagleCheckpoint(read_eagle_config(file, values, tensors, target), DummyEagleWeights(path, device, dtype))
