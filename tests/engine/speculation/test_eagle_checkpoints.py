"""EAGLE checkpoints: what is read, what is refused and how that is said, and that what is written is read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import one_thread
from safetensors.torch import load_file, save_file
from tiny_eagle import DRAFT_VOCAB_SIZE, tiny_eagle, write_head
from tiny_models import tiny_llama
from torch import Tensor

from quire.engine.models.decoder import Decoder
from quire.engine.models.model import ModelDtype
from quire.engine.models.registry import load_model
from quire.engine.speculation.eagle.checkpoint import write_eagle3
from quire.engine.speculation.eagle.config import EagleConfig, EagleKind, default_taps
from quire.engine.speculation.eagle.head import load_eagle
from quire.service.checkpoint.locate import CheckpointFormat
from quire.service.errors import ModelError
from quire.speculate.draft_model import DraftModel

LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("model")
    with one_thread():
        tiny_llama(folder, num_hidden_layers=8)
        model = load_model(folder, CheckpointFormat.FOLDER, ModelDtype.FLOAT32, lambda *_: None)
    assert isinstance(model, Decoder)
    return model


def test_published_settings(target: Decoder, tmp_path: Path) -> None:
    """Which layers are tapped when a file does not say, and what each publisher calls it when it does."""
    head = tiny_eagle(target.config)
    for settings, taps in (
        ({}, (2, 4, 5)),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}, (1, 3, 6)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 7]}}, (0, 1, 7)),
    ):
        path = write_head(head, tmp_path, "safeail", **settings)
        loaded = load_eagle(path, target, ModelDtype.FLOAT32)
        assert loaded.config.taps == taps
        assert loaded.config.kind is EagleKind.EAGLE3
        assert torch.equal(loaded.target_ids, head.target_ids)
    assert default_taps(32) == (2, 16, 29)
    path = write_head(tiny_eagle(target.config, "eagle"), tmp_path / "one", "safeail")
    assert load_eagle(path, target, ModelDtype.FLOAT32).config.taps == (8,)


def test_what_equals_llamas_defaults_may_be_left_out(target: Decoder, tmp_path: Path) -> None:
    """speculators writes only what differs from transformers' LlamaConfig."""
    path = write_head(tiny_eagle(target.config), tmp_path, "speculators")
    config = json.loads((path / "config.json").read_text())
    assert config["transformer_layer_config"].pop("hidden_act") == "silu"
    del config["transformer_layer_config"]["num_hidden_layers"]
    config["transformer_layer_config"]["rms_norm_eps"] = None
    del config["transformer_layer_config"]["rms_norm_eps"]
    (path / "config.json").write_text(json.dumps(config))
    assert load_eagle(path, target, ModelDtype.FLOAT32).config.layer.rms_norm_eps == 1e-6


def test_embeddings_that_are_the_targets_are_kept_once(target: Decoder, tmp_path: Path) -> None:
    """Published heads carry a copy, which for a large vocabulary is as large as the rest of the head."""
    path = write_head(tiny_eagle(target.config), tmp_path, "safeail")
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"embed_tokens.weight": target.embedding.clone()}, path / "model.safetensors")
    assert load_eagle(path, target, ModelDtype.FLOAT32)._parts.embedding is target.embedding
    save_file(tensors | {"embed_tokens.weight": target.embedding + 1}, path / "model.safetensors")
    own = load_eagle(path, target, ModelDtype.FLOAT32)._parts.embedding
    assert torch.equal(own, target.embedding + 1)


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def with_tensor(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensor

    return change


@pytest.mark.parametrize(
    ("settings", "change", "said"),
    [
        (
            {"speculators_model_type": "medusa"},
            None,
            "speculators_model_type = 'medusa': supported are eagle and eagle3",
        ),
        ({"draft_vocab_size": 0}, None, "draft_vocab_size = 0: must be a positive integer"),
        ({"draft_vocab_size": 300}, None, "draft_vocab_size = 300: the model's vocabulary has 259 tokens"),
        ({"target_hidden_size": 64}, None, "target_hidden_size = 64: the model has 48: take the head that was trained"),
        (
            {"eagle_aux_hidden_state_layer_ids": [1, 2, 8]},
            None,
            "[1, 2, 8]: give a list of layers of the model, 0 to 7",
        ),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, None, "the tensor fc.weight"),
        (
            {"transformer_layer_config": {"vocab_size": 32000}},
            None,
            "vocab_size = 32000: the model has 259: take the head",
        ),
        ({"norm_before_fc": True}, None, "lacks the tensor input_norm.weight"),
        ({"layernorms": True}, None, "layernorms = True: only false is supported"),
        (None, without("fc.weight"), "lacks the tensor fc.weight"),
        (None, without("lm_head.weight"), "lacks the tensor lm_head.weight"),
        (None, without("d2t"), "lacks the tensor d2t"),
        (None, without("layers.0.self_attn.k_proj.weight"), f"lacks the tensor {LAYER}self_attn.k_proj.weight"),
        (
            None,
            with_tensor("layers.1.mlp.up_proj.weight", torch.ones(2)),
            "tensors that its architecture does not have",
        ),
        (None, with_tensor("norm.weight", torch.ones(47)), "norm.weight of"),
        (None, with_tensor("norm.weight", torch.ones(48, dtype=torch.int8)), "only unquantized heads are supported"),
        (None, with_tensor("d2t", torch.full((DRAFT_VOCAB_SIZE,), 200)), "the tensor d2t of"),
        (None, with_tensor("d2t", -torch.arange(DRAFT_VOCAB_SIZE)), "the tensor d2t of"),
        (None, with_tensor("t2d", torch.ones(259, dtype=torch.bool)), "names other tokens than d2t does"),
        (None, with_tensor("embed_tokens.weight", torch.ones(259, 24)), "embed_tokens.weight"),
    ],
)
def test_a_head_that_does_not_fit_is_named(
    target: Decoder,
    tmp_path: Path,
    settings: dict[str, Any] | None,
    change: Callable[[dict[str, Tensor]], None] | None,
    said: str,
) -> None:
    """A head for another model drafts garbage without failing: it must be refused while loading, by name."""
    path = write_head(tiny_eagle(target.config), tmp_path, "speculators", **(settings or {}))
    if change is not None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelError) as error:
        load_eagle(path, target, ModelDtype.FLOAT32)
    assert said in error.value.message
    assert str(path) in error.value.message or "the head" in error.value.message


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", None, "holds no config.json: name the folder of an EAGLE head"),
        ("config.json", b"[]", "holds no JSON object"),
        ("model.safetensors", None, "holds neither model.safetensors nor pytorch_model.bin"),
        ("model.safetensors", b"\0" * 20, "can't be read"),
        ("pytorch_model.bin", b"not a pickle", "can't be read"),
    ],
)
def test_broken_files(target: Decoder, tmp_path: Path, file: str, content: bytes | None, said: str) -> None:
    """A download that broke off must not end in a traceback."""
    write_head(tiny_eagle(target.config), tmp_path, "safeail")
    (tmp_path / "model.safetensors").unlink() if file.startswith("pytorch") else (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ModelError) as error:
        load_eagle(tmp_path, target, ModelDtype.FLOAT32)
    assert said in error.value.message


def test_a_pickle_runs_no_code(target: Decoder, tmp_path: Path) -> None:
    """pytorch_model.bin of a stranger must not be able to do more than hold tensors."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "touched",))

    write_head(tiny_eagle(target.config), tmp_path, "safeail pickled")
    torch.save({"fc.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError):
        load_eagle(tmp_path, target, ModelDtype.FLOAT32)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_what_is_written_is_read_again(target: Decoder, tmp_path: Path, norm_before_residual: bool) -> None:
    """A trained head that comes back as another one is an hour of a GPU lost."""
    config = EagleConfig(
        EagleKind.EAGLE3,
        replace(target.config, num_layers=1, windows=(0,)),
        target.config.hidden_size,
        (1, 4, 6),
        DRAFT_VOCAB_SIZE,
        norm_before_residual=norm_before_residual,
    )
    ids = torch.arange(DRAFT_VOCAB_SIZE) * 2
    model = DraftModel(config, target.embedding, ids)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    write_eagle3(tmp_path / "head", config, tensors, ids, "tiny")
    loaded = load_eagle(tmp_path / "head", target, ModelDtype.FLOAT32)
    read = loaded.config
    assert (read.kind, read.taps, read.draft_vocab_size) == (config.kind, config.taps, config.draft_vocab_size)
    assert read.norm_before_residual is norm_before_residual
    assert read.layer.rope == config.layer.rope and read.layer.head_size == config.layer.head_size
    assert torch.equal(loaded.target_ids, ids)
    stored = load_file(tmp_path / "head" / "model.safetensors")
    assert stored["d2t"].dtype is torch.int64 and stored["t2d"].dtype is torch.bool
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    written = json.loads((tmp_path / "head" / "config.json").read_text())
    assert written["speculators_config"]["verifier"]["name_or_path"] == "tiny"
