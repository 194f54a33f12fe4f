"""The arguments of LLM, generate and chat: which are vLLM's and not supported, and what the engine is told."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, TypeVar

from quire.engine.config import CoreConfig, Device, Dtype, KVCacheDtype, LoadFormat, Speculation
from quire.llm.arguments import ArgumentError, Unsupported, check_arguments, check_number

C = TypeVar("C", bound=Enum)

_ARGUMENTS = (
    *("model", "tokenizer", "dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens"),
    *("enable_prefix_caching", "kv_cache_bytes", "kv_cache_memory_bytes", "num_pages", "seed", "threads"),
    *("device", "gpu_memory_utilization", "enforce_eager", "load_format", "speculative_config", "kv_cache_dtype"),
    "tensor_parallel_size",
)
_UNSUPPORTED: Unsupported = {
    "pipeline_parallel_size": ((None, 1), "set tensor_parallel_size"),
    "data_parallel_size": ((None, 1), "make an LLM in each of several processes"),
    "distributed_executor_backend": ((None, "mp"), "each GPU has a process: leave it out"),
    "quantization": ((None,), "a GGUF file's own quantization is used: leave it out"),
    "num_gpu_blocks_override": ((None,), "set num_pages"),
    "block_size": ((None, 16), "pages have 16 tokens: leave it out"),
    "swap_space": ((None, 0), "what is preempted is computed again: leave it out"),
    "cpu_offload_gb": ((None, 0), "leave it out"),
    "enable_chunked_prefill": ((None, True), "long prompts always come in chunks: set max_num_batched_tokens"),
    "disable_log_stats": ((None, True, False), "leave it out: metrics() tells"),
    "trust_remote_code": ((None, False), "models' own code is never run: leave it out"),
    "tokenizer_mode": ((None, "auto"), "leave it out"),
    "skip_tokenizer_init": ((None, False), "leave it out"),
    "revision": ((None,), "name a folder that holds that revision as model"),
    "tokenizer_revision": ((None,), "name a folder that holds that revision as tokenizer"),
    "download_dir": ((None,), "set the environment's HF_HOME"),
    "hf_token": ((None, False), "set the environment's HF_TOKEN"),
    "hf_overrides": ((None,), "change the folder's config.json"),
    "enable_lora": ((None, False), "leave it out"),
    "compilation_config": ((None,), "leave it out"),
    "limit_mm_per_prompt": ((None,), "models take text only: leave it out"),
    "runner": ((None, "auto", "generate"), "models generate text only: leave it out"),
    "task": ((None, "auto", "generate"), "models generate text only: leave it out"),
}
_SPECULATION = ("method", "model", "num_speculative_tokens")
_EAGLE = ("eagle3", "eagle")
_METHODS = ("suffix", *_EAGLE)
_NO_TREE = "the longest match decides: leave it out"
_NO_MODEL = "a head runs as its model does: leave it out"
_SPECULATION_UNSUPPORTED: Unsupported = {
    "draft_tensor_parallel_size": ((None,), _NO_MODEL),
    "quantization": ((None,), _NO_MODEL),
    "max_model_len": ((None,), _NO_MODEL),
    "revision": ((None,), _NO_MODEL),
    "prompt_lookup_max": ((None,), _NO_TREE),
    "prompt_lookup_min": ((None,), _NO_TREE),
    "suffix_decoding_max_tree_depth": ((None,), "set num_speculative_tokens"),
    "suffix_decoding_max_cached_requests": ((None,), "what is remembered is bounded in tokens: leave it out"),
    "suffix_decoding_max_spec_factor": ((None,), _NO_TREE),
    "suffix_decoding_min_token_prob": ((None,), "how many drafts are worth it is measured: leave it out"),
    "disable_by_batch_size": ((None,), "how many drafts are worth it is measured: leave it out"),
}
_CALL_UNSUPPORTED: Unsupported = {
    "lora_request": ((None,), "leave it out"),
    "tokenization_kwargs": ((None,), "give token ids"),
    "tools": ((None,), "describe them in a system message"),
    "add_generation_prompt": ((True,), "use generate with the text that you want"),
    "continue_final_message": ((False,), "use generate with the text that you want"),
    "chat_template_content_format": (("auto", "string"), "leave it out"),
    "chat_template_kwargs": ((None,), "give a chat_template that needs none"),
    "mm_processor_kwargs": ((None,), "models take text only: leave it out"),
}


def check_call(call: str, others: Mapping[str, object], known: Sequence[str]) -> None:
    """Raises ArgumentError if one of `others`, given to `generate` or `chat`, is not among `known` and may matter."""
    check_arguments(call, others, known, _CALL_UNSUPPORTED)


def core_config(
    dtype: Any, device: Any, load_format: Any, kv_cache_dtype: Any, others: Mapping[str, object], **given: Any
) -> CoreConfig:
    """The core's configuration from those arguments that are not None; `others` are those that LLM does not know.

    Raises ConfigError for a wrong value, ArgumentError for a wrong name or type.
    """
    check_arguments("LLM", others, _ARGUMENTS, _UNSUPPORTED)
    for name in (
        *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_bytes", "num_pages", "threads"),
        "tensor_parallel_size",
    ):
        check_number(name, given[name], whole=True, optional=True)
    check_number("gpu_memory_utilization", given["gpu_memory_utilization"], optional=True)
    # Calls bring all their prompts at once.
    given_ones = {name: value for name, value in given.items() if value is not None}
    return CoreConfig(
        dtype=_choice("dtype", Dtype, {"float": "float32"}.get(_name(dtype), _name(dtype))),
        device=_choice("device", Device, "auto" if device is None else str(device)),
        load_format=_choice("load_format", LoadFormat, "auto" if load_format is None else str(load_format)),
        kv_cache_dtype=_choice(
            "kv_cache_dtype", KVCacheDtype, "auto" if kv_cache_dtype is None else _name(kv_cache_dtype)
        ),
        max_waiting=sys.maxsize,
        **given_ones,
    )


def speculation(config: object) -> dict[str, Any]:
    """The core's settings for a `speculative_config`, none for None. Raises ArgumentError."""
    if config is None:
        return {}
    field = "speculative_config"
    if not isinstance(config, Mapping):
        raise ArgumentError(f'{field} is {config!r}: give a dict, such as {{"method": "suffix"}}', field=field)
    check_arguments(field, config, _SPECULATION, _SPECULATION_UNSUPPORTED)
    method = config.get("method")
    if method not in _METHODS:
        close = difflib.get_close_matches(str(method), _METHODS, n=1)
        advice = f"did you mean {close[0]}?" if close else f"choose {' or '.join(_METHODS)}"
        raise ArgumentError(f"{field}'s method is {method!r}: {advice}", field=f"{field}.method")
    settings: dict[str, Any] = {"speculation": Speculation.AUTO}
    model = config.get("model")
    if (model is None) == (method in _EAGLE):
        advice = "give the folder of a head" if model is None else "drafts come from what was said before: leave it out"
        raise ArgumentError(f"{field}'s method is {method} and model is {model!r}: {advice}", field=f"{field}.model")
    if model is not None:
        settings["speculative_model"] = os.fspath(model)
    if (num_tokens := config.get("num_speculative_tokens")) is not None:
        check_number("num_speculative_tokens", num_tokens, whole=True)
        settings["num_speculative_tokens"] = num_tokens
    return settings


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _choice(field: str, kind: type[C], name: str) -> C:
    try:
        return kind(name)
    except ValueError as error:
        known = ", ".join(known.value for known in kind)
        raise ArgumentError(f"{field} is {name!r}: choose one of {known}", field=field) from error
