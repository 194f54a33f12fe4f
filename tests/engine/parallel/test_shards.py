"""Which part of a model each rank reads: nothing is left out, nothing counted twice."""

from __future__ import annotations

import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import Array, random_blocks, write_gguf
from tiny_models import tiny_model
from torch import Tensor

from quire.engine.models.dummy import DummyWeights
from quire.engine.models.gguf import GgufWeights
from quire.engine.models.qwen2 import configure
from quire.engine.models.safetensors import FolderWeights
from quire.engine.models.weights import QuantizedWeight, Weights, dense
from quire.engine.parallel.shards import Shard, ShardedWeights
from quire.service.errors import ConfigError

VOCAB_SIZE = 259
SHAPE: dict[str, object] = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32, "num_hidden_layers": 1,
    "vocab_size": VOCAB_SIZE,
}  # fmt: skip
# Without blocks, with blocks of which a shard's columns are some, and with ones that they cut.
KINDS = ("folder", "F16", "Q4_1", "Q8_0", "Q4_K")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def opened(folder: Path, kind: str, kv_heads: int) -> Weights:
    """A checkpoint of any kind; "llama" in GGUF, whose rows have another order, and Qwen2, which has biases."""
    path = folder / f"{kind}-{kv_heads}"
    family = "qwen2" if kind == "folder" else "llama"
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim" or family == "llama"}
    model = tiny_model(path, family, num_key_value_heads=kv_heads, **shape)
    if kind == "folder":
        return FolderWeights(path)
    quantization = GGMLQuantizationType[kind]

    def encode(name: str, tensor: Array) -> tuple[Array, GGMLQuantizationType]:
        if tensor.ndim == 1:
            return tensor, GGMLQuantizationType.F32
        if kind == "F16":
            return tensor.astype("float16"), quantization
        return random_blocks(quantization, *tensor.shape, seed=zlib.crc32(name.encode())), quantization

    return GgufWeights(write_gguf(path / "tiny.gguf", model, encode))


@given(
    kind=st.sampled_from(KINDS),
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    size=st.sampled_from([1, 2, 4, 8]),
    name=st.sampled_from(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]),
)
@settings(deadline=None, max_examples=150)
def test_the_shards_are_the_matrix(folder: Path, kind: str, kv_heads: int, size: int, name: str) -> None:
    """A row or a column that two ranks have, or none, changes what the model says; so does another order of rows."""
    weights = opened(folder, kind, kv_heads)
    whole = configure(weights.settings)
    query, kv, width = 8 * 32, kv_heads * 32, 512
    rows, columns = {
        "q_proj": (query, 256), "k_proj": (kv, 256), "v_proj": (kv, 256), "o_proj": (256, query),
        "gate_proj": (width, 256), "up_proj": (width, 256), "down_proj": (256, width), "lm_head": (VOCAB_SIZE, 256),
    }[name]  # fmt: skip
    by_columns, by_rows = name in ("o_proj", "down_proj"), name != "lm_head"
    prefix = "self_attn" if name[0] in "qkvo" else "mlp"
    full_name = "lm_head.weight" if name == "lm_head" else f"model.layers.0.{prefix}.{name}.weight"
    parts: list[Tensor] = []
    for rank in range(size):
        shard = Shard(rank, size)
        own = shard.config(whole)
        share = own.num_kv_heads * 32 if name in ("k_proj", "v_proj") else (columns if by_columns else rows) // size
        asked = (rows, share) if by_columns else (share if by_rows else rows, columns)
        part = ShardedWeights(weights, whole, shard).matrix(full_name, *asked)
        if isinstance(part, QuantizedWeight):
            assert kind in ("Q4_1", "Q8_0")
        parts.append(dense(part).to(torch.float32))
    expected = dense(weights.matrix(full_name, rows, columns)).to(torch.float32)
    if name in ("k_proj", "v_proj") and size > kv_heads:
        copies = size // kv_heads
        assert all(torch.equal(parts[rank], parts[rank // copies * copies]) for rank in range(size))
        parts = parts[::copies]
    assert torch.equal(torch.cat(parts, 1 if by_columns else 0), expected)


@pytest.mark.parametrize("size", [2, 8])
def test_biases(folder: Path, size: int) -> None:
    """One before attention belongs to the rows that it is added to; one after a sum is added once, not by each rank."""
    weights = opened(folder, "folder", 2)
    whole = configure(weights.settings)
    shards = [Shard(rank, size) for rank in range(size)]
    name = "model.layers.0.self_attn.q_proj.bias"
    parts = [ShardedWeights(weights, whole, shard).vector(name, 256 // size) for shard in shards]
    assert torch.equal(torch.cat(parts), weights.vector(name, 256))
    ones = OnesWeights(folder / "folder-2", torch.device("cpu"), torch.float32)
    after = [ShardedWeights(ones, whole, shard).vector("model.layers.0.self_attn.o_proj.bias", 256) for shard in shards]
    assert torch.equal(torch.stack(after).sum(0), torch.ones(256))


class OnesWeights(DummyWeights):
    """All vectors are ones: no family with such a bias is needed."""

    def vector(self, name: str, size: int) -> Tensor:
        return torch.ones(size)


@given(vocab_size=st.integers(1, 300), size=st.integers(1, 9))
def test_every_token_has_one_rank(vocab_size: int, size: int) -> None:
    """Vocabularies divide by no number in particular."""
    shares = [Shard(rank, size).vocabulary(vocab_size) for rank in range(size)]
    assert [token for share in shares for token in share] == list(range(vocab_size))
    assert all(len(share) <= -(-vocab_size // size) for share in shares)


@pytest.mark.parametrize(
    ("size", "changes", "choice"),
    [
        (3, {}, "choose one of 1, 2, 4, 8"),
        (16, {}, "choose one of 1, 2, 4, 8"),
        (4, {"num_heads": 12, "num_kv_heads": 6}, "choose one of 1, 2$"),
        (8, {"intermediate_size": 12}, "choose one of 1, 2, 4$"),
    ],
)
def test_models_that_do_not_divide(folder: Path, size: int, changes: dict[str, int], choice: str) -> None:
    """It is said before weights are read, with what would work."""
    whole = replace(configure(opened(folder, "folder", 2).settings), **changes)
    with pytest.raises(ConfigError, match=rf"--tensor-parallel-size is {size}, and the model has .*{choice}"):
        Shard(0, size).config(whole)
