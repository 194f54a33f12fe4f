"""Names and values of arguments: what a user who comes from vLLM, or mistypes, is told."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import tiny_checkpoint

from quire.llm import LLM, SamplingParams, StructuredOutputsParams
from quire.service.errors import ConfigError, InvalidRequestError, ModelError, QuireError


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_modellen": 5}, "LLM has no argument 'max_modellen': did you mean max_model_len?"),
        ({"tensor_paralel_size": 1}, "did you mean tensor_parallel_size?"),
        ({"qqqq": 1}, "LLM has no argument 'qqqq': it takes model, tokenizer, dtype"),
        (
            {"pipeline_parallel_size": 2},
            "pipeline_parallel_size is 2, which is not supported: set tensor_parallel_size",
        ),
        ({"tensor_parallel_size": True}, "tensor_parallel_size is True"),
        ({"tensor_parallel_size": 0}, "^tensor_parallel_size is 0: it must be at least 1"),
        ({"quantization": "awq"}, "quantization is 'awq', which is not supported"),
        ({"gpu_memory_utilization": 9}, "gpu_memory_utilization is 9: give a share"),
        ({"dtype": "half"}, "dtype is 'half': choose one of auto, float32, bfloat16"),
        ({"max_model_len": "5"}, "max_model_len is '5': give a whole number or None"),
        ({"max_model_len": -1}, "^max_model_len is -1: 0 chooses it"),
        ({"max_model_len": 10**6}, "^max_model_len is 1000000 and the model's context is 4096: lower it"),
        ({"num_pages": 2}, "raise kv_cache_bytes to .* or lower max_model_len"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0: it must be at least 1"),
        ({"kv_cache_bytes": 1 << 25, "kv_cache_memory_bytes": 1 << 25}, "the same: give one"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"speculative_config": 8}, "speculative_config is 8: give a dict"),
        ({"speculative_config": {"metod": "suffix"}}, "no argument 'metod': did you mean method?"),
        ({"speculative_config": {"method": "sufix"}}, "method is 'sufix': did you mean suffix?"),
        ({"speculative_config": {"num_speculative_tokens": 4}}, "method is None: choose suffix or eagle3 or eagle"),
        ({"speculative_config": {"method": "suffix", "model": "x"}}, "method is suffix and model is 'x': drafts come"),
        (
            {"speculative_config": {"method": "suffix", "num_speculative_tokens": 0}},
            r"^num_speculative_tokens is 0: it must lie in \[1, 64\]",
        ),
        (
            {"speculative_config": {"method": "suffix", "num_speculative_tokens": "8"}},
            "num_speculative_tokens is '8': give a whole number",
        ),
    ],
)
def test_llm_says_what_is_wrong(checkpoint: Path, arguments: dict[str, object], words: str) -> None:
    """Without it a typing mistake would be ignored, and the model would run in another way than was asked."""
    with pytest.raises(QuireError, match=words) as caught:
        LLM(checkpoint, **arguments)  # type: ignore[arg-type]
    inner = arguments.get("speculative_config")
    fields = {*inner, "speculative_config.method", "speculative_config.model"} if isinstance(inner, dict) else set()
    assert caught.value.field in {*arguments, "kv_cache_bytes", *fields}
    if "no argument" in words:
        assert isinstance(caught.value, TypeError)


def test_what_changes_nothing_is_accepted(checkpoint: Path) -> None:
    """Without it a program written for vLLM would have to be rewritten for what it does not even use."""
    with LLM(
        str(checkpoint), tensor_parallel_size=1, quantization=None, enforce_eager=True, trust_remote_code=False,
        dtype=torch.float32, kv_cache_memory_bytes=1 << 22, max_num_seqs=1000, max_model_len=64,
    ) as llm:  # fmt: skip
        assert llm.metrics().pages_total == (1 << 22) // (2 * 2 * 2 * 8 * 4 * 16)
        output = llm.generate("a", SamplingParams(max_tokens=1, skip_special_tokens=True), lora_request=None)
        assert len(output[0].outputs[0].token_ids) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"temprature": 1}, "SamplingParams has no argument 'temprature': did you mean temperature?"),
        ({"best_of": 3}, "best_of is 3, which is not supported: set n"),
        ({"temperature": "hot"}, "temperature is 'hot': give a number"),
        ({"temperature": -1}, r"^temperature is -1: it must lie in \[0.0, 100.0\]"),
        ({"top_p": 0}, r"^top_p is 0: it must lie in \(0.0, 1.0\]"),
        ({"top_k": -2}, "^top_k is -2"),
        ({"n": 0}, "n is 0: it must be at least 1"),
        ({"max_tokens": 0}, "^max_tokens is 0"),
        ({"min_tokens": 17}, r"^min_tokens is 17: it must lie in \[0, 16\]"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"stop": ""}, "stop holds an empty string"),
        ({"stop": [5]}, "give a list of strings"),
        ({"bad_words": "word"}, "give a list of strings"),
        ({"logprobs": 21}, r"^logprobs is 21: it must lie in \[0, 20\]"),
        ({"prompt_logprobs": -1}, "^prompt_logprobs is -1"),
        ({"logit_bias": {5: 101.0}}, r"^logit_bias is 101.0: it must lie in \[-100.0, 100.0\]"),
        ({"logit_bias": {"five": 1.0}}, "logit_bias is .*: give token ids and numbers"),
        ({"stop_token_ids": ["five"]}, "stop_token_ids is .*: give token ids"),
        ({"repetition_penalty": float("nan")}, "must be a finite number"),
    ],
)
def test_sampling_params_say_what_is_wrong(arguments: dict[str, object], words: str) -> None:
    """Without it a wrong value would show when the model is loaded and the job is running."""
    with pytest.raises(InvalidRequestError, match=words) as caught:
        SamplingParams(**arguments)  # type: ignore[arg-type]
    assert caught.value.field == next(iter(arguments))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "nothing set: give exactly one of json, regex, choice, grammar, json_object"),
        ({"regex": "a", "json": {}}, "json and regex set"),
        ({"jsn": {}}, "did you mean json?"),
        ({"choice": "yes"}, "choice is 'yes': give a list of texts"),
        ({"choice": ["yes", ""]}, "give a list of texts"),
        ({"regex": 5}, "regex is 5: give a string"),
    ],
)
def test_structured_outputs_say_what_is_wrong(arguments: dict[str, object], words: str) -> None:
    """Without it an output could be left free, or held by another rule than the one that was meant."""
    with pytest.raises(InvalidRequestError, match=words):
        StructuredOutputsParams(**arguments)  # type: ignore[arg-type]


def test_params_are_values() -> None:
    """Without it params could not be compared, copied, sent to another process, or completed by an editor."""
    params = SamplingParams(temperature=0.5, stop=["a"])
    assert params == pickle.loads(pickle.dumps(params)) == replace(params, n=1) != replace(params, n=2)
    assert "temperature" in inspect.signature(SamplingParams).parameters
    with pytest.raises(AttributeError):
        params.n = 3  # type: ignore[misc]


def test_calls_say_what_is_wrong(tiny: LLM) -> None:
    """Without it a mistyped argument of a call would be ignored."""
    with pytest.raises(InvalidRequestError, match="generate has no argument 'use_tqm': did you mean use_tqdm"):
        tiny.generate("a", use_tqm=False)
    with pytest.raises(InvalidRequestError, match="lora_request is 'x', which is not supported"):
        tiny.generate("a", lora_request="x")
    with pytest.raises(InvalidRequestError, match=r"tools is .*: describe them in a system message"):
        tiny.chat([], tools=[{}])
    with pytest.raises(InvalidRequestError, match="embed is not supported: LLM generates text"):
        tiny.embed(["a"])


def test_another_models_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    """Without it a model without a tokenizer could not be used, or one that does not fit it would go unnoticed."""
    bare = tiny_checkpoint(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        LLM(bare)
    params = SamplingParams(temperature=0, max_tokens=3)
    with LLM(bare, tokenizer=checkpoint, dtype="float32", max_model_len=64) as llm:
        assert llm.chat([{"role": "user", "content": "hi"}], params, use_tqdm=False)[0].outputs[0].token_ids
    with pytest.raises(ConfigError, match="49152 tokens and the model 259"):
        LLM(bare, tokenizer="")
