"""Tiny models of every family, on both sides, and prompts that share pages: what the parity tests compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from tiny_models import greedy, tiny_model

from quire.engine.models.model import ModelDtype
from quire.engine.models.registry import load_model
from quire.service.checkpoint.locate import CheckpointFormat

VOCAB_SIZE = 259
MAX_MODEL_LEN = 96
PROMPTS = [tuple(3 + (p * 37 + i * i * (p + 1)) % 250 for i in range(n)) for p, n in enumerate((1, 7, 16, 33, 48, 60))]
# Prompts that begin like others, so that pages are shared; one is another's whole pages and nothing more.
PROMPTS += [(*PROMPTS[4][:40], 9, 8, 7), PROMPTS[4][:32], PROMPTS[5] + (250,)]

# Stretched over a context that the prompts exceed, so that every branch of the stretching is taken.
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 32}
WINDOW = {"use_sliding_window": True, "sliding_window": 19}

MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama, one kv head": ("llama", {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 1}),
    "llama, wide heads": ("llama", {"head_dim": 16, "rms_norm_eps": 1e-5}),
    "llama, rope llama3": ("llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
    "llama, rope linear": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama, rope yarn": ("llama", {"rope_parameters": YARN_ROPE, "head_dim": 32}),
    "llama, biases": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": 21}),
    "mistral, window of a page": ("mistral", {"sliding_window": 16, "head_dim": 16}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows above": ("qwen2", {**WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, tied, biases, window below": (
        "qwen3",
        {
            **WINDOW,
            "head_dim": 8,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


@contextmanager
def one_thread() -> Iterator[None]:
    """For tiny models: threads that wait for each other on a busy machine take a hundred times as long as the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Reference:
    """A model on both sides, and transformers' answers, each computed once."""

    def __init__(self, folder: Path, name: str) -> None:
        family, overrides = MODELS[name]
        self.folder = folder
        self.theirs = tiny_model(folder, family, seed=len(name), **overrides)
        # Attention as it is written out in transformers: the least that could differ between versions of torch.
        self.theirs.set_attn_implementation("eager")
        self.ours = load_model(folder, CheckpointFormat.FOLDER, ModelDtype.FLOAT32, lambda *_: None)
        self.answer = cache(lambda prompt: greedy(self.theirs, list(prompt), 24))

    @torch.inference_mode()
    def logits(self, tokens: tuple[int, ...]) -> torch.Tensor:
        logits: torch.Tensor = self.theirs(torch.tensor([tokens])).logits[0]
        return logits
