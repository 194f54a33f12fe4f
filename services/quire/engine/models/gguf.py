"""Reading a model from one GGUF file (llama.cpp's format): its names of settings and tensors, its order of rows."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from quire.engine.models.gguf_blocks import decode
from quire.engine.models.settings import Settings
from quire.engine.models.weights import Checklist, LinearWeight, dense
from quire.service.checkpoint.gguf_metadata import GgufHeader, GgufTensor, read_header
from quire.service.checkpoint.text import gguf_eos_token_ids
from quire.service.errors import ModelError

# By Hugging Face's names; GGUF's follow the architecture's and a dot.
_SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "v_head_dim": "attention.value_length",
    "rotary_dim": "rope.dimension_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "num_local_experts": "expert_count",
    "rope_parameters.rope_theta": "rope.freq_base",
    "rope_parameters.rope_type": "rope.scaling.type",
    "rope_parameters.factor": "rope.scaling.factor",
    "rope_parameters.original_max_position_embeddings": "rope.scaling.original_context_length",
}
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
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_FREQUENCY_DIVISORS = "rope_freqs.weight"
# llama.cpp's converter stores this architecture's query and key rows with the two of a rotary pair side by side.
_PAIRS_TOGETHER = "llama"
_HEADS = {".q_proj.": "num_attention_heads", ".k_proj.": "num_key_value_heads"}


class GgufWeights:
    """An open GGUF file; see `quire.engine.models.weights.Weights`."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.settings = _settings(path, header)
        self._path = path
        self._data = np.memmap(path, mode="c")
        self._tensors = {tensor.name: tensor for tensor in header.tensors}
        self._checklist = Checklist(path, {tensor.name: tensor.shape for tensor in header.tensors})

    def vector(self, name: str, size: int) -> Tensor:
        """Float32 [size]."""
        values = self._vector(_file_name(name), size)
        return self._halves_apart(name, values.unsqueeze(1)).flatten()

    def matrix(self, name: str, rows: int, columns: int) -> LinearWeight:
        """[rows, columns], packed or in the type it is stored in."""
        return self.part(name, (rows, columns), range(rows), range(columns))

    def part(self, name: str, shape: tuple[int, int], rows: range, columns: range) -> LinearWeight:
        """Of the matrix `name`, which has `shape`, these rows and columns; dense if they cut blocks."""
        tensor = self._take(_file_name(name), shape)
        block_size, block_bytes = self._block(tensor)
        first, end = columns.start // block_size, -(-columns.stop // block_size)
        blocks = self._rows(tensor)[rows.start : rows.stop, first * block_bytes : end * block_bytes].contiguous()
        weight = self._decode(tensor, self._halves_apart(name, blocks))
        if columns.start % block_size == 0 and columns.stop % block_size == 0:
            return weight
        return dense(weight)[:, columns.start - first * block_size : columns.stop - first * block_size]

    def frequency_divisors(self, size: int) -> Tensor | None:
        """Float32 [size], by which rotary frequencies are to be divided; None if the settings say it all."""
        return self._vector(_FREQUENCY_DIVISORS, size) if _FREQUENCY_DIVISORS in self._tensors else None

    def finish(self) -> None:
        """Raises ModelError if tensors are left that nobody asked for."""
        self._checklist.finish()

    def _vector(self, file_name: str, size: int) -> Tensor:
        tensor = self._take(file_name, (size,))
        return dense(self._decode(tensor, self._rows(tensor))).view(size).to(torch.float32)

    def _take(self, file_name: str, shape: tuple[int, ...]) -> GgufTensor:
        self._checklist.take(file_name, shape)
        return self._tensors[file_name]

    def _halves_apart(self, name: str, rows: Tensor) -> Tensor:
        """Puts rows of `name`, [heads × head_size, any], into Hugging Face's order: a head's first halves of pairs
        first."""
        heads = next((setting for part, setting in _HEADS.items() if part in name), None)
        if heads is None or self.settings.text("model_type") != _PAIRS_TOGETHER:
            return rows
        num_heads = self.settings.integer(heads, self.settings.integer("num_attention_heads"))
        head_size = self._tensors[_file_name(name)].shape[0] // num_heads
        pairs = rows.view(-1, head_size // 2, 2, rows.shape[1])
        return pairs.transpose(1, 2).reshape(rows.shape)

    def _rows(self, tensor: GgufTensor) -> Tensor:
        """The tensor's bytes, uint8 [rows, bytes of a row]; a vector is one row."""
        block_size, block_bytes = self._block(tensor)
        columns = tensor.shape[-1]
        row_bytes = columns // block_size * block_bytes
        num_rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        end = tensor.offset + num_rows * row_bytes
        if columns % block_size or end > self._data.size:
            raise ModelError(
                f"{self._path} ends within the tensor {tensor.name} or describes it wrongly: download it again",
                field="model",
            )
        return torch.from_numpy(self._data[tensor.offset : end]).view(num_rows, row_bytes)

    def _block(self, tensor: GgufTensor) -> tuple[int, int]:
        """How many numbers a block of the tensor's type has, and bytes."""
        try:
            return GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
        except (ValueError, KeyError) as error:
            raise self._unknown_type(tensor) from error

    def _decode(self, tensor: GgufTensor, rows: Tensor) -> LinearWeight:
        try:
            return decode(rows, GGMLQuantizationType(tensor.kind))
        except NotImplementedError as error:
            raise self._unknown_type(tensor) from error

    def _unknown_type(self, tensor: GgufTensor) -> ModelError:
        return ModelError(
            f"the tensor {tensor.name} of {self._path} is of a type that is not known ({tensor.kind}): convert the "
            "model to Q4_1, Q8_0 or F16",
            field="model",
        )


def _file_name(name: str) -> str:
    match = _LAYER_NAME.fullmatch(name)
    return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}" if match else _NAMES[name]


def _settings(path: Path, header: GgufHeader) -> Settings:
    """The metadata by Hugging Face's names."""
    metadata, shapes = header.metadata, {tensor.name: tensor.shape for tensor in header.tensors}
    architecture = metadata.get("general.architecture")
    spelling = {name: f"{architecture}.{key}" for name, key in _SETTINGS.items()}
    spelling["model_type"] = "general.architecture"
    values = {name: metadata.get(key) for name, key in spelling.items()}
    if values["vocab_size"] is None and "token_embd.weight" in shapes:
        values["vocab_size"] = shapes["token_embd.weight"][0]
    if values["rope_parameters.rope_type"] == "none":
        values["rope_parameters.rope_type"] = "default"
    values["tie_word_embeddings"] = "output.weight" not in shapes
    values["attention_bias"] = "blk.0.attn_q.bias" in shapes
    return Settings(path, values, spelling, gguf_eos_token_ids(metadata))
