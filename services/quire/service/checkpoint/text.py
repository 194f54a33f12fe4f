"""A model's text side: tokenizer, chat template, special tokens, lengths."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from quire.service.checkpoint.gguf_metadata import read_metadata
from quire.service.checkpoint.gguf_tokenizer import build_tokenizer
from quire.service.checkpoint.locate import Checkpoint, CheckpointFormat
from quire.service.errors import ModelError


@dataclass(frozen=True, slots=True)
class TextModel:
    """What turns text into a model's tokens and back.

    Encode with `add_special_tokens=False`: a chat template writes its own special tokens; for bare text put
    `bos_token` in front if `add_bos`. `vocab_size` is the width of the model's logits, which may be larger than the
    tokenizer's vocabulary. `max_model_len` counts prompt and output tokens together. `bos_token` and `eos_token` are
    empty if the model has none; a model may end its turn with any of `eos_token_ids`.
    """

    tokenizer: Tokenizer = field(repr=False)
    chat_template: str | None
    bos_token: str
    eos_token: str
    add_bos: bool
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]


def load_text(checkpoint: Checkpoint) -> TextModel:
    """Reads `checkpoint`'s text side. Raises ModelError that names what is missing or broken."""
    try:
        if checkpoint.format is CheckpointFormat.GGUF:
            return _from_gguf(read_metadata(checkpoint.path))
        return _from_folder(checkpoint.path)
    except KeyError as error:
        raise ModelError(
            f"{checkpoint.path} lacks {error.args[0]}: the model's export is incomplete", field="model"
        ) from error


def gguf_eos_token_ids(metadata: dict[str, Any]) -> tuple[int, ...]:
    """The tokens that end a turn, from a GGUF file's metadata."""
    return _distinct(metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))


def folder_eos_token_ids(path: Path, tokenizer: Tokenizer | None = None) -> tuple[int, ...]:
    """The tokens that end a turn, for a Hugging Face folder: what the model was trained to end with and, often another,
    what its tokenizer calls the end. `tokenizer` spares reading the folder's. Raises ModelError."""
    generation = _read_json(path / "generation_config.json", required=False)
    trained = generation.get("eos_token_id", _language_config(path).get("eos_token_id"))
    eos_token = _token(_read_json(path / "tokenizer_config.json", required=False).get("eos_token"))
    if tokenizer is None and eos_token and (path / "tokenizer.json").is_file():
        tokenizer = _read_tokenizer(path / "tokenizer.json")
    return _distinct([*_ids(trained), tokenizer.token_to_id(eos_token) if tokenizer else None])


def _distinct(ids: Iterable[int | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def _language_config(path: Path) -> dict[str, Any]:
    config = _read_json(path / "config.json")
    # Models that also see images keep the language model's part here.
    language: dict[str, Any] = config.get("text_config", config)
    return language


def _from_gguf(metadata: dict[str, Any]) -> TextModel:
    tokens = metadata["tokenizer.ggml.tokens"]
    architecture = metadata["general.architecture"]
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    eos_token_ids = gguf_eos_token_ids(metadata)
    return TextModel(
        tokenizer=build_tokenizer(metadata),
        chat_template=metadata.get("tokenizer.chat_template"),
        bos_token=tokens[bos] if bos is not None else "",
        eos_token=tokens[eos_token_ids[0]] if eos_token_ids else "",
        # llama.cpp's converter leaves the key out for models of this one kind, which do begin with it.
        add_bos=metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.pre") == "llama-bpe"),
        vocab_size=metadata.get(f"{architecture}.vocab_size", len(tokens)),
        max_model_len=metadata[f"{architecture}.context_length"],
        eos_token_ids=eos_token_ids,
    )


def _from_folder(path: Path) -> TextModel:
    config = _language_config(path)
    settings = _read_json(path / "tokenizer_config.json", required=False)
    tokenizer = _read_tokenizer(path / "tokenizer.json")
    bos_token, eos_token = _token(settings.get("bos_token")), _token(settings.get("eos_token"))
    bos = tokenizer.token_to_id(bos_token)
    return TextModel(
        tokenizer=tokenizer,
        chat_template=_chat_template(path, settings),
        bos_token=bos_token,
        eos_token=eos_token,
        add_bos=bos is not None and tokenizer.encode("").ids[:1] == [bos],
        vocab_size=config["vocab_size"],
        max_model_len=config["max_position_embeddings"],
        eos_token_ids=folder_eos_token_ids(path, tokenizer),
    )


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path} is missing: save the model's fast tokenizer there, "
            "with transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…)",
            field="model",
        ) from error
    except Exception as error:  # what tokenizers raises for a broken file is Exception itself
        raise ModelError(
            f"{path} is not a readable tokenizer.json ({error}): download it again", field="model"
        ) from error


def _read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if not required:
            return {}
        raise ModelError(f"{path} is missing: the model's export is incomplete", field="model") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON ({error}): download it again", field="model") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object: download it again", field="model")
    return content


def _chat_template(path: Path, settings: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _token(value: Any) -> str:
    """A token of tokenizer_config.json: a string, an AddedToken's members, or null."""
    return str(value["content"]) if isinstance(value, dict) else str(value or "")


def _ids(value: Any) -> list[int]:
    """An id of config.json: a number, a list of them, or null."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
