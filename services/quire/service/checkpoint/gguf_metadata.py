"""The head of a GGUF file: key-value metadata, and the table of tensors.

Written here because `gguf.GGUFReader` makes several arrays of every string: two seconds for a vocabulary of 49,000
tokens, where this takes 50 milliseconds. Every process of a server reads it at its start. What tensors hold is for
`gguf`.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.service.errors import ModelError

_MAGIC = b"GGUF"
_HEADER = struct.Struct("<4sIQQ")
_LENGTH = struct.Struct("<Q")
_KIND = struct.Struct("<I")
_ARRAY = struct.Struct("<IQ")
_STRING = 8
_NESTED = 9
_ALIGNMENT = 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's entry: `kind` is a number of gguf.GGMLQuantizationType, `shape` has the rows first."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int  # of its first byte, from the file's beginning


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """All that stands before the tensors' data."""

    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]


def read_metadata(path: Path) -> dict[str, Any]:
    """All of the file's metadata: strings, numbers, booleans and lists of them, by key. Raises ModelError."""
    return read_header(path).metadata


def read_header(path: Path) -> GgufHeader:
    """The file's metadata and tensors. Raises ModelError."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(data, path)
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ModelError(f"{path} is not a readable GGUF file ({error}): download it again", field="model") from error


def _read(data: mmap.mmap, path: Path) -> GgufHeader:
    magic, version, num_tensors, num_keys = _HEADER.unpack_from(data)
    if magic != _MAGIC or version not in (2, 3):
        raise ModelError(
            f"{path} is no GGUF file of version 2 or 3 in little-endian order: convert the model again", field="model"
        )
    position = _HEADER.size
    metadata = {}
    for _ in range(num_keys):
        key, position = _string(data, position)
        (kind,) = _KIND.unpack_from(data, position)
        metadata[key], position = _value(data, position + _KIND.size, kind)
    entries = []
    for _ in range(num_tensors):
        name, position = _string(data, position)
        (dimensions,) = _KIND.unpack_from(data, position)
        entry = struct.Struct(f"<{dimensions}QIQ")
        *sizes, kind, offset = entry.unpack_from(data, position + _KIND.size)
        position += _KIND.size + entry.size
        entries.append((name, kind, tuple(reversed(sizes)), offset))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    start = -(-position // alignment) * alignment
    return GgufHeader(metadata, tuple(GgufTensor(name, kind, shape, start + at) for name, kind, shape, at in entries))


def _value(data: mmap.mmap, position: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _string(data, position)
    if kind == _NESTED:
        kind, count = _ARRAY.unpack_from(data, position)
        return _array(data, position + _ARRAY.size, kind, count)
    values, position = _array(data, position, kind, 1)
    return values[0], position


def _array(data: mmap.mmap, position: int, kind: int, count: int) -> tuple[list[Any], int]:
    if kind not in (_STRING, _NESTED):
        numbers = struct.Struct(f"<{count}{_SCALARS[kind]}")
        return list(numbers.unpack_from(data, position)), position + numbers.size
    values = []
    for _ in range(count):
        value, position = _value(data, position, kind)
        values.append(value)
    return values, position


def _string(data: mmap.mmap, position: int) -> tuple[str, int]:
    (length,) = _LENGTH.unpack_from(data, position)
    start = position + _LENGTH.size
    end = start + length
    if end > len(data):
        raise ValueError("it ends within its metadata")
    # Vocabularies of some models hold pieces of characters; only their exact place in the list matters.
    return data[start:end].decode("utf-8", "replace"), end
