"""Tiny random models in Hugging Face's layout, made on the spot: every code path of a real one in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

EOS = 2


def tiny_llama(folder: Path, *, seed: int = 0, vocab_size: int = 259, **overrides: object) -> LlamaForCausalLM:
    """Writes a random Llama to `folder` and returns it as transformers' own model, in float32."""
    settings: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
        # Wide enough that the largest logit stands out: ties would make greedy outputs differ by rounding.
        "initializer_range": 0.3,
        **overrides,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval().float()  # type: ignore[arg-type]
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, prompt: list[int], max_tokens: int) -> list[int]:
    """What the model answers to `prompt`, each token the most likely one, computed from scratch each time."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]
