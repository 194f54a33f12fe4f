"""Reading a model from a Hugging Face folder: config.json and safetensors in one file or many shards, memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quire.engine.models.settings import Settings
from quire.engine.models.weights import Checklist, LinearWeight
from quire.service.checkpoint.text import folder_eos_token_ids
from quire.service.errors import ModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Old exports carry this buffer, which is computed from the configuration.
_COMPUTED = "rotary_emb.inv_freq"
_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor is."""

    file: Any  # what safe_open gives
    shape: tuple[int, ...]


class FolderWeights:
    """An open folder; see `quire.engine.models.weights.Weights`."""

    def __init__(self, path: Path) -> None:
        self.settings = read_settings(path)
        self._path = path

    @cached_property
    def _tensors(self) -> dict[str, _Stored]:
        # Not before they are asked for: that the settings are of another architecture is the better error.
        tied = self.settings.flag("tie_word_embeddings", False)
        return {
            name: stored
            for file in _files(self._path)
            for name, stored in _open(file)
            if not name.endswith(_COMPUTED) and not (name == "lm_head.weight" and tied)
        }

    @cached_property
    def _checklist(self) -> Checklist:
        return Checklist(self._path, {name: stored.shape for name, stored in self._tensors.items()})

    def vector(self, name: str, size: int) -> Tensor:
        """Float32 [size]."""
        return self._take(name, (size,)).to(torch.float32)

    def matrix(self, name: str, rows: int, columns: int) -> LinearWeight:
        """[rows, columns], in the type it is stored in."""
        return self._take(name, (rows, columns))

    def part(self, name: str, shape: tuple[int, int], rows: range, columns: range) -> LinearWeight:
        """Of the matrix `name`, which has `shape`, these rows and columns."""
        # A view of the mapped file: what it leaves out is not read.
        return self._take(name, shape)[rows.start : rows.stop, columns.start : columns.stop]

    def frequency_divisors(self, size: int) -> None:
        """There are none: the settings say it all."""

    def finish(self) -> None:
        """Raises ModelError if tensors are left that nobody asked for."""
        self._checklist.finish()

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self._checklist.take(name, shape)
        tensor: Tensor = self._tensors[name].file.get_tensor(name)
        return tensor


def _open(path: Path) -> Iterator[tuple[str, _Stored]]:
    """The tensors of a file by name; raises ModelError if it can't be read or holds other types than floats."""
    try:
        file: Any = safe_open(str(path), framework="pt")
        for name in file.keys():  # noqa: SIM118  not a dict
            part = file.get_slice(name)
            if part.get_dtype() not in _DTYPES:
                raise ModelError(
                    f"the tensor {name} of {path} is of type {part.get_dtype()}: only {', '.join(_DTYPES)} are "
                    "supported; take the model's unquantized export or a GGUF file",
                    field="model",
                )
            yield name, _Stored(file, tuple(part.get_shape()))
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path} is not a readable safetensors file ({error}): download it again", field="model"
        ) from error


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
        return [path / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a readable index ({error}): download it again", field="model") from error


def read_settings(path: Path) -> Settings:
    """A folder's config.json; raises ModelError if it can't be used."""
    file = path / "config.json"
    return settings_of(file, read_json_object(file), folder_eos_token_ids(path))


def read_json_object(file: Path) -> dict[str, Any]:
    """Raises ModelError if it can't be read."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{file} is not a readable configuration ({error}): download it again", field="model"
        ) from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} holds no JSON object: download it again", field="model")
    return values


def settings_of(file: Path, values: dict[str, Any], eos_token_ids: Sequence[int] = ()) -> Settings:
    """The settings of a model in Hugging Face's words, `values` of `file`; raises ModelError if they can't be used."""
    # transformers 5 gathers what older ones wrote as rope_theta and rope_scaling.
    group = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    rope = values.get(group) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ModelError(
            f"{file} has {group} = {rope!r}: only one set of values for all layers is supported", field="model"
        )
    spelling = {f"rope_parameters.{name}": f"{group}.{name}" for name in rope}
    nested = {f"rope_parameters.{name}": value for name, value in rope.items()}
    nested.setdefault("rope_parameters.rope_type", rope.get("type"))
    nested.setdefault("rope_parameters.rope_theta", values.get("rope_theta"))
    return Settings(file, values | nested, spelling, eos_token_ids)
