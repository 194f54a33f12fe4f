"""GGUF files of tiny models, written as llama.cpp's converter writes them: its names, its order of rotary pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from transformers import PreTrainedModel

Array = npt.NDArray[Any]
Encode = Callable[[str, Array], tuple[Array, GGMLQuantizationType]]

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def encode_as(kind: GGMLQuantizationType) -> Encode:
    """Matrices as `kind`, one of those that the gguf package quantizes to; vectors stay float32, as in real files."""

    def encode(name: str, tensor: Array) -> tuple[Array, GGMLQuantizationType]:
        if tensor.ndim == 1 or kind is GGMLQuantizationType.F32:
            return tensor, GGMLQuantizationType.F32
        return quantize(tensor, kind), kind

    return encode


def random_blocks(kind: GGMLQuantizationType, rows: int, columns: int, seed: int) -> Array:
    """Bytes of a random matrix [rows, columns] of any quantized `kind`, whose values are finite and not large."""
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    generator, pool = np.random.default_rng(seed), np.empty((0, block_bytes), np.uint8)
    while len(pool) < 100:
        blocks = generator.integers(0, 256, (2000, block_bytes), np.uint8)
        with np.errstate(all="ignore"):
            largest = np.abs(dequantize(blocks, kind)).max(axis=1)
        pool = np.concatenate((pool, blocks[(largest > 0.05) & (largest < 0.5)]))
    return pool[generator.integers(0, len(pool), rows * columns // block_size)].reshape(rows, -1)


def write_gguf(path: Path, model: PreTrainedModel, encode: Encode | None = None, **overrides: Any) -> Path:
    """Writes `model` to `path` and returns that. `encode` has the tensors' names in GGUF and their values in float32;
    what `overrides` names without its "llama." replaces metadata, None leaves it out ("__" stands for ".")."""
    config = model.config
    architecture = _ARCHITECTURES[config.model_type]
    prefix = gguf.MODEL_ARCH_NAMES[architecture]
    writer = gguf.GGUFWriter(path, prefix)
    metadata = _metadata(config) | {key.replace("__", "."): value for key, value in overrides.items()}
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(f"{prefix}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{prefix}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{prefix}.{key}", value)
    writer.add_eos_token_id(config.eos_token_id)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    encode = encode or encode_as(GGMLQuantizationType.F32)
    for theirs, tensor in model.state_dict().items():
        if theirs == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        data, kind = encode(name, _pairs_together(name, tensor.float().numpy(), config))
        writer.add_tensor(name, data, raw_dtype=kind)
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _frequency_factors(model))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    metadata = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if config.model_type in ("llama", "mistral"):
        metadata["rope.dimension_count"] = head_size
    if rope["rope_type"] in ("linear", "yarn"):
        metadata |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        metadata["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return metadata


def _pairs_together(name: str, tensor: Array, config: Any) -> Array:
    """llama.cpp's rotary embedding for this architecture turns neighbours: q and k rows are put in that order."""
    is_query = ".attn_q." in name
    if config.model_type not in ("llama", "mistral") or not (is_query or ".attn_k." in name):
        return tensor
    heads = config.num_attention_heads if is_query else config.num_key_value_heads
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)


def _frequency_factors(model: PreTrainedModel) -> Array:
    """How Llama 3's files say how their frequencies are stretched: by what each is divided."""
    rotary = model.model.rotary_emb
    base, size = model.config.rope_parameters["rope_theta"], 2 * len(rotary.inv_freq)
    plain = base ** -(np.arange(0, size, 2) / size)
    return (plain / rotary.inv_freq.double().numpy()).astype(np.float32)
