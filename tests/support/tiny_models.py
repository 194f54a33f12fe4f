"""Tiny random models in Hugging Face's layout, made on the spot: every code path of a real one in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

EOS = 2


def tiny_llama(folder: Path, *, seed: int = 0, vocab_size: int = 259, **overrides: object) -> LlamaForCausalLM:
    """Writes a random Llama to `folder` and returns it as transformers' own model, in float32."""
    model: LlamaForCausalLM = _random_model("llama", seed, {"vocab_size": vocab_size, **overrides})
    model.save_pretrained(folder)
    return model


def tiny_model(folder: Path, family: str, *, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """As `tiny_llama` for any family, by its model_type; norms and biases are random, too, as if it was trained."""
    model = _random_model(family, seed, overrides)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data = 0.3 * torch.randn_like(parameter) + ("norm" in name)
    model.save_pretrained(folder)
    return model


def _random_model(family: str, seed: int, overrides: dict[str, object]) -> PreTrainedModel:
    settings: dict[str, object] = {
        "vocab_size": 259,
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
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    return model.eval().float()


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """What the model answers to `prompt`, each token the most likely one, computed from scratch each time."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]
