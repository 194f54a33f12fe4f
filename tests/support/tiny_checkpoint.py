"""A tiny random Llama with a text side: what `quire serve` needs of a checkpoint, ready in two seconds."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_models import EOS, tiny_llama
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

MAX_MODEL_LEN = 4096

_SPECIAL = ("<pad>", "<s>", "</s>")
_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


def tiny_checkpoint(folder: Path) -> Path:
    """Writes it to `folder` and returns that. A token is a byte; the API calls the model by the folder's name."""
    assert _SPECIAL[EOS] == "</s>"
    vocab = {piece: index for index, piece in enumerate([*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tiny_llama(folder, vocab_size=len(vocab), max_position_embeddings=MAX_MODEL_LEN)
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in _SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": _TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
