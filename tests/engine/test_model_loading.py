"""Checkpoints in both formats: read as they are, and what a broken one is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from teacher_forced import teacher_forced_logits
from tiny_gguf import encode_as, write_gguf
from tiny_models import tiny_llama

from quire.engine.models.model import Model, ModelDtype
from quire.engine.models.registry import load_model
from quire.service.checkpoint.locate import CheckpointFormat, locate
from quire.service.errors import ModelError

TOKENS = [3, 250, 17, 99, 4, 4, 181, 0, 258, 30, 31, 32, 33, 34, 35, 36, 37, 38]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_llama(tmp_path / "tiny"))


def load(path: Path, dtype: ModelDtype = ModelDtype.FLOAT32) -> Model:
    """As the engine does it: the path is what a person types after --model."""
    checkpoint = locate(str(path))
    return load_model(checkpoint.path, checkpoint.format, dtype, lambda *_: None)


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as raised:
        load(path)
    assert raised.value.field == "model" and str(path) in raised.value.message
    return raised.value.message


def change_json(file: Path, **changes: Any) -> None:
    """Sets keys of a JSON object, or takes them out where the value is `...`."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def change_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_folder_of_many_shards_is_the_same_model(tmp_path: Path) -> None:
    """Models over a few gigabytes come in shards: one that is skipped or read twice would be a broken model."""
    theirs = tiny_llama(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    assert torch.equal(logits(load(tmp_path / "one")), logits(load(tmp_path / "many")))


def test_a_gguf_file_is_the_same_model_as_its_folder(tmp_path: Path) -> None:
    """The order of rotary pairs or the names of tensors may differ from the folder's without an error."""
    theirs = tiny_llama(tmp_path / "tiny", rms_norm_eps=2.0**-20)  # GGUF has it in float32
    ours = load(write_gguf(tmp_path / "tiny.gguf", theirs))
    assert torch.equal(logits(load(tmp_path / "tiny")), logits(ours))
    assert ours.config == load(tmp_path / "tiny").config


def test_progress_goes_from_nothing_to_all(folder: Path) -> None:
    """`quire serve` draws a bar from it: one that jumps back or never ends looks like a hang."""
    seen: list[float] = []
    load_model(folder, CheckpointFormat.FOLDER, ModelDtype.FLOAT32, lambda done, what: seen.append(done))
    assert seen[0] == 0.0 and seen[-1] == 1.0 and seen == sorted(seen)


def test_old_names_of_rope_settings_are_read(folder: Path) -> None:
    """Nearly every model on the hub was saved by transformers 4, which wrote rope_theta beside the other settings."""
    change_json(folder / "config.json", rope_parameters=..., rope_theta=777.0, rope_scaling=None)
    old = logits(load(folder))
    change_json(folder / "config.json", rope_theta=..., rope_parameters={"rope_theta": 777.0, "rope_type": "default"})
    assert torch.equal(old, logits(load(folder)))


def test_an_unsupported_architecture_says_what_is_supported(folder: Path, file: Path) -> None:
    """A user of another model must learn at the start that it can't run, and which can."""
    change_json(folder / "config.json", model_type="gpt_neox")
    assert "gpt_neox" in refusal(folder) and "llama" in refusal(folder)
    renamed = file.with_name("renamed.gguf")
    renamed.write_bytes(file.read_bytes().replace(b"llama", b"mamba"))
    assert "mamba" in refusal(renamed) and "llama" in refusal(renamed)


def test_a_config_of_another_architecture_is_not_called_incomplete(folder: Path) -> None:
    """Other architectures have other settings: to ask for Llama's would send the user looking for a better download."""
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8, "vocab_size": 10}))
    assert "gpt2" in refusal(folder) and "supported" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": ...}, ["hidden_size", "lacks"]),
        ({"hidden_size": "48"}, ["hidden_size", "'48'", "integer"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "0", "positive"]),
        ({"rms_norm_eps": None}, ["rms_norm_eps"]),
        ({"num_key_value_heads": 4}, ["num_key_value_heads", "4", "6"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq", "GGUF"]),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["rope", "dynamic", "llama3", "linear"]),
    ],
)
def test_a_setting_that_cannot_be_served_is_named(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    """A model that is computed without one of its settings answers nonsense: the user must hear which it is."""
    change_json(folder / "config.json", **changes)
    message = refusal(folder)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_a_config_that_is_no_object_is_named(folder: Path, content: str) -> None:
    """An interrupted download leaves such files; a traceback would not say which."""
    (folder / "config.json").write_text(content)
    assert str(folder / "config.json") in refusal(folder)


def test_a_missing_or_misshapen_or_foreign_tensor_is_named(folder: Path) -> None:
    """Weights of another model, or half of them, must not load as if they fitted."""
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    change_tensors(weights, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight" in refusal(folder)
    weights.write_bytes(whole)
    change_tensors(weights, lambda tensors: tensors.update({"model.norm.weight": torch.ones(50)}))
    message = refusal(folder)
    assert all(word in message for word in ("model.norm.weight", "[50]", "[48]")), message
    weights.write_bytes(whole)
    change_tensors(weights, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.ones(1)}))
    assert "model.layers.0.extra.weight" in refusal(folder)


def test_a_tensor_of_an_unsupported_type_is_named(folder: Path) -> None:
    """Quantized exports hold integers: read as they are they would be weights of a thousand times their size."""
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(folder / "model.safetensors", lambda t: t.update({name: t[name].to(torch.int8)}))
    message = refusal(folder)
    assert name in message and "I8" in message and "BF16" in message


@pytest.mark.parametrize("keep", [0, 4, 100, 2000, -1])
def test_a_truncated_file_is_named_whatever_is_left_of_it(folder: Path, file: Path, keep: int) -> None:
    """Downloads break off anywhere; a model without its last bytes must not start."""
    for path in (folder / "model.safetensors", file):
        path.write_bytes(path.read_bytes()[:keep])
    assert "download it again" in refusal(folder) and "model.safetensors" in refusal(folder)
    assert "download it again" in refusal(file)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    """Of thirty shards one is easily lost: its name is what the user needs to fetch it."""
    tiny_llama(tmp_path / "one").save_pretrained(tmp_path / "many", max_shard_size="20KB")
    lost = sorted((tmp_path / "many").glob("model-*.safetensors"))[1]
    lost.unlink()
    assert str(lost) in refusal(tmp_path / "many")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(folder: Path, content: str) -> None:
    """Without it a half-written index is a traceback."""
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(folder)


def test_a_folder_without_weights_says_how_to_save_them(folder: Path) -> None:
    """Old models come as pickles, which are not read: the way out is one line."""
    (folder / "model.safetensors").unlink()
    assert "save_pretrained" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embedding_length": None}, ["llama.embedding_length", "lacks"]),
        ({"attention__head_count_kv": 4}, ["llama.attention.head_count_kv", "4", "6"]),
        ({"expert_count": 8}, ["llama.expert_count", "8"]),
        ({"rope__scaling__type": "longrope"}, ["llama.rope.scaling.type", "longrope", "linear"]),
        ({"rope__dimension_count": 4}, ["llama.rope.dimension_count", "4", "8"]),
        ({"feed_forward_length": 64}, ["blk.0.ffn_gate.weight", "[64, 48]", "[96, 48]"]),
    ],
)
def test_metadata_that_cannot_be_served_is_named(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    """The same as for a folder: by the name that stands in the file."""
    message = refusal(write_gguf(tmp_path / "tiny.gguf", tiny_llama(tmp_path / "tiny"), **changes))
    assert all(word in message for word in words), message


def test_a_gguf_tensor_of_a_type_from_the_future_is_named(tmp_path: Path) -> None:
    """llama.cpp adds types every year; a file of one must say which tensor and what to convert it to."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tmp_path / "tiny"))
    data = bytearray(path.read_bytes())
    name = b"blk.1.ffn_up.weight"
    kind = data.index(name) + len(name) + 4 + 2 * 8  # past the number of dimensions and both of them
    data[kind : kind + 4] = (999).to_bytes(4, "little")
    path.write_bytes(data)
    message = refusal(path)
    assert all(word in message for word in ("blk.1.ffn_up.weight", "999", "Q8_0")), message


@pytest.mark.parametrize("dtype", list(ModelDtype))
def test_rows_that_no_block_divides_are_refused(tmp_path: Path, dtype: ModelDtype) -> None:
    """Block types need rows of whole blocks; a header that says otherwise would shift every row after the first."""
    path = tmp_path / "tiny.gguf"
    model = tiny_llama(tmp_path / "tiny", hidden_size=32, num_attention_heads=4, intermediate_size=64)
    write_gguf(path, model, encode_as(GGMLQuantizationType.Q8_0))
    data = bytearray(path.read_bytes())
    name = b"blk.0.ffn_down.weight"
    columns = data.index(name) + len(name) + 4
    data[columns : columns + 8] = np.uint64(65).tobytes()
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_down\.weight"):
        load(path, dtype)


def logits(model: Model) -> torch.Tensor:
    return teacher_forced_logits(model, [TOKENS], len(TOKENS))[0]
