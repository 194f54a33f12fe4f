"""Reading a model from one GGUF file (llama.cpp's format). What stands in quantized tensors is for the `gguf` package,
but for the three types that are kept packed: their codes and scales are taken apart here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from quire.engine.models.config import ModelConfig
from quire.engine.models.weights import GROUP_SIZE, Checklist, LinearWeight, QuantizedWeight, dense
from quire.service.checkpoint.gguf_metadata import GgufHeader, GgufTensor, read_header
from quire.service.checkpoint.text import gguf_eos_token_ids
from quire.service.errors import ModelError

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


class GgufWeights:
    """An open GGUF file; see `quire.engine.models.weights.Weights`."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.config = _config(path, header)
        self._path = path
        self._data = np.memmap(path, mode="c")
        self._tensors = {tensor.name: tensor for tensor in header.tensors}
        self._checklist = Checklist(path, {tensor.name: tensor.shape for tensor in header.tensors})

    def vector(self, name: str, size: int) -> Tensor:
        """Float32 [size]."""
        tensor = self._take(name, (size,))
        return dense(_decode(self._rows(tensor), GGMLQuantizationType(tensor.kind))).view(size).to(torch.float32)

    def matrix(self, name: str, rows: int, columns: int) -> LinearWeight:
        """[rows, columns], packed or in the type it is stored in."""
        tensor = self._take(name, (rows, columns))
        data = self._rows(tensor)
        if name.endswith("q_proj.weight"):
            data = _half_split(data, self.config.num_heads)
        elif name.endswith("k_proj.weight"):
            data = _half_split(data, self.config.num_kv_heads)
        return _decode(data, GGMLQuantizationType(tensor.kind))

    def finish(self) -> None:
        """Raises ModelError if tensors are left that nobody asked for."""
        self._checklist.finish()

    def _take(self, name: str, shape: tuple[int, ...]) -> GgufTensor:
        name = _file_name(name)
        self._checklist.take(name, shape)
        return self._tensors[name]

    def _rows(self, tensor: GgufTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The tensor's bytes, [rows, bytes of a row]."""
        try:
            block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
        except (ValueError, KeyError) as error:
            raise ModelError(
                f"the tensor {tensor.name} of {self._path} is of an unknown type ({tensor.kind}): convert the model to "
                "Q4_1, Q8_0 or F16",
                field="model",
            ) from error
        columns = tensor.shape[-1]
        row_bytes = columns // block_size * block_bytes
        num_rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        end = tensor.offset + num_rows * row_bytes
        if columns % block_size or end > self._data.size:
            raise ModelError(
                f"{self._path} ends within the tensor {tensor.name} or describes it wrongly: download it again",
                field="model",
            )
        return self._data[tensor.offset : end].reshape(num_rows, row_bytes)


def _file_name(name: str) -> str:
    match = _LAYER_NAME.fullmatch(name)
    return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}" if match else _NAMES[name]


def _half_split(rows: np.ndarray[Any, np.dtype[np.uint8]], num_heads: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Undoes llama.cpp's order of query and key rows: its converter puts the two of a rotary pair side by side."""
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _decode(rows: np.ndarray[Any, np.dtype[np.uint8]], kind: GGMLQuantizationType) -> LinearWeight:
    data = torch.from_numpy(rows)
    if kind in _FLOATS:
        return data.view(_FLOATS[kind])
    if kind in _PACKED:
        _, block_bytes = GGML_QUANT_SIZES[kind]
        return _PACKED[kind](data.view(data.shape[0], -1, block_bytes))
    return torch.from_numpy(dequantize(rows, kind))


def _q4_0(blocks: Tensor) -> QuantizedWeight:
    scales = _half(blocks, 0)
    return QuantizedWeight(_nibbles(blocks[..., 2:]), scales, -8 * scales, 4)


def _q4_1(blocks: Tensor) -> QuantizedWeight:
    return QuantizedWeight(_nibbles(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2), 4)


def _q8_0(blocks: Tensor) -> QuantizedWeight:
    codes = blocks[..., 2:].contiguous().view(torch.int8).view(blocks.shape[0], -1)
    return QuantizedWeight(codes, _half(blocks, 0), None, 8)


def _nibbles(packed: Tensor) -> Tensor:
    """[N, blocks, 16] bytes to [N, K] codes: a block's low nibbles are its first half."""
    codes = torch.empty(*packed.shape[:-1], 2, GROUP_SIZE // 2, dtype=torch.uint8)
    torch.bitwise_and(packed, 15, out=codes[..., 0, :])
    torch.bitwise_right_shift(packed, 4, out=codes[..., 1, :])
    return codes.view(packed.shape[0], -1)


def _half(blocks: Tensor, offset: int) -> Tensor:
    """The float16 at a place in every block, as float32 [N, blocks]."""
    return blocks[..., offset : offset + 2].contiguous().view(torch.float16).squeeze(-1).to(torch.float32)


_FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_PACKED: dict[GGMLQuantizationType, Callable[[Tensor], QuantizedWeight]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q8_0: _q8_0,
}


def _config(path: Path, header: GgufHeader) -> ModelConfig:
    metadata = header.metadata
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    try:
        architecture = str(metadata["general.architecture"])
        of = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
        num_heads, hidden_size = of["attention.head_count"], of["embedding_length"]
        config = ModelConfig(
            architecture=architecture,
            vocab_size=of.get("vocab_size", shapes["token_embd.weight"][0]),
            hidden_size=hidden_size,
            intermediate_size=of["feed_forward_length"],
            num_layers=of["block_count"],
            num_heads=num_heads,
            num_kv_heads=of.get("attention.head_count_kv", num_heads),
            head_size=of.get("attention.key_length", hidden_size // num_heads),
            max_model_len=of["context_length"],
            rms_norm_eps=of["attention.layer_norm_rms_epsilon"],
            rope_theta=of.get("rope.freq_base", 10000.0),
            tie_word_embeddings="output.weight" not in shapes,
            eos_token_ids=gguf_eos_token_ids(metadata),
        )
    except KeyError as error:
        raise ModelError(
            f"{path} lacks {error.args[0]}: the model's export is incomplete or its architecture is not supported",
            field="model",
        ) from error
    unsupported = {
        "rope.scaling.type": of.get("rope.scaling.type", "none") != "none",
        "expert_count": of.get("expert_count", 0) > 0,
        "attention.head_count_kv": not isinstance(config.num_kv_heads, int),
        "rope.dimension_count": of.get("rope.dimension_count", config.head_size) != config.head_size,
    }
    for key, found in unsupported.items():
        if found:
            raise ModelError(f"{path} has {architecture}.{key} = {of[key]}, which is not supported yet", field="model")
    return config
