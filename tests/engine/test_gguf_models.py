"""GGUF files of every family and every quantization against transformers reading the same file."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import _type_traits, dequantize
from numpy import float32
from teacher_forced import teacher_forced_logits
from tiny_gguf import Array, encode_as, random_blocks, write_gguf
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from quire.engine.models.gguf import GgufWeights
from quire.engine.models.model import ModelDtype
from quire.engine.models.registry import load_model
from quire.engine.models.weights import dense
from quire.service.checkpoint.locate import CheckpointFormat

TOKENS = [3, 41, 17, 9, 9, 181, 0, 255, 30, 31, 32, 33, 34, 35, 36, 37, 38, 3, 2, 1]
# Every row is one block of the largest types.
WIDE = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 32,
    "num_key_value_heads": 4, "num_hidden_layers": 1, "tie_word_embeddings": False,
}  # fmt: skip
QUANTIZED = sorted(_type_traits, key=lambda kind: kind.value)
SIMPLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16")


def compare(path: Path, atol: float) -> None:
    """Both read `path`; the logits must agree."""
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ours = load_model(path, CheckpointFormat.GGUF, ModelDtype.FLOAT32, lambda *_: None)
    with torch.inference_mode():
        expected = theirs(torch.tensor([TOKENS])).logits[0]
    (logits,) = teacher_forced_logits(ours, [TOKENS], 7)
    assert expected.std() > 0.1, "logits that are all the same prove nothing"
    torch.testing.assert_close(logits, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_1", "Q8_0"])
def test_files_of_all_families(tmp_path: Path, family: str, kind: str) -> None:
    """A tensor that only one family has, or a row order that only one has, would be read for all as for Llama."""
    shape: dict[str, object] = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 256}
    shape |= {
        "llama": {"head_dim": 32},
        "mistral": {"sliding_window": None},
        "qwen2": {},
        "qwen3": {"head_dim": 128},  # transformers leaves the file's head size out
    }[family]
    model = tiny_model(tmp_path, family, tie_word_embeddings=True, **shape)
    compare(write_gguf(tmp_path / "tiny.gguf", model, encode_as(GGMLQuantizationType[kind])), 1e-4)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_a_model_of_every_type_that_gguf_dequantizes(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    """Files on the hub come in thirty types; one that is read wrongly gives a model that babbles."""

    def encode(name: str, tensor: Array) -> tuple[Array, GGMLQuantizationType]:
        if tensor.ndim == 1:
            return tensor, GGMLQuantizationType.F32
        return random_blocks(kind, *tensor.shape, seed=zlib.crc32(name.encode())), kind

    compare(write_gguf(tmp_path / "tiny.gguf", tiny_model(tmp_path, "llama", **WIDE), encode), 1e-3)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_weights_are_those_of_the_gguf_package(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    """Types that are kept packed are taken apart here: a bit in the wrong place may be too small to change a token."""
    written: dict[str, Array] = {}

    def encode(name: str, tensor: Array) -> tuple[Array, GGMLQuantizationType]:
        if tensor.ndim == 1:
            return tensor, GGMLQuantizationType.F32
        written[name] = random_blocks(kind, *tensor.shape, seed=zlib.crc32(name.encode()))
        return written[name], kind

    weights = GgufWeights(write_gguf(tmp_path / "tiny.gguf", tiny_model(tmp_path, "qwen3", **WIDE), encode))
    for name, theirs in (("q_proj", "attn_q"), ("v_proj", "attn_v")):
        expected = torch.from_numpy(dequantize(written[f"blk.0.{theirs}.weight"], kind).astype(float32))
        found = dense(weights.matrix(f"model.layers.0.self_attn.{name}.weight", *expected.shape))
        assert torch.equal(found.to(torch.float32), expected)


def test_all_types_of_todays_files_are_among_those() -> None:
    """The lists above come from the package: were it to lose one, its tests would be gone without a word."""
    names = {kind.name for kind in QUANTIZED} | {"F16", "F32"}
    assert names >= {*SIMPLE, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ2_XS", "IQ1_S"}
    assert all(kind in GGML_QUANT_SIZES for kind in QUANTIZED)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_packed_weights_in_the_fast_mode(tmp_path: Path, kind: str) -> None:
    """The fast mode multiplies with the packed weights themselves: they must be the same model up to rounding."""
    model = tiny_model(tmp_path, "qwen2", **{**WIDE, "initializer_range": 0.1})
    path = write_gguf(tmp_path / "tiny.gguf", model, encode_as(GGMLQuantizationType[kind]))
    exact, fast = (load_model(path, CheckpointFormat.GGUF, dtype, lambda *_: None) for dtype in ModelDtype)
    (expected,) = teacher_forced_logits(exact, [TOKENS], len(TOKENS))
    for chunk in (1, 3, len(TOKENS)):
        (logits,) = teacher_forced_logits(fast, [TOKENS], chunk)
        error = (logits - expected).norm() / expected.norm()
        assert error < 0.03, f"{error:.3f} with {chunk} tokens in a step"
