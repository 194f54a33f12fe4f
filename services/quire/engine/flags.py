"""The flags of an engine's core, for every command that runs one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from quire.engine.config import CoreConfig, Device, Dtype, KVCacheDtype, LoadFormat, Speculation


def add_core_flags(option: Callable[..., Any], *, speculation: Speculation = Speculation.AUTO) -> None:
    """What the model runs on, its batch and its memory; `speculation` is the default."""
    core = CoreConfig()
    option(
        "--device", default=core.device.value, choices=[device.value for device in Device],
        help="auto: the GPU, if there is one",
    )  # fmt: skip
    option(
        "--load-format", default=core.load_format.value, choices=[format.value for format in LoadFormat],
        help="dummy: random weights for a folder with config.json, to measure speed",
    )  # fmt: skip
    option(
        "--dtype", default=core.dtype.value, choices=[dtype.value for dtype in Dtype],
        help="float32 is exact; auto is the fastest that the device does well (default: %(default)s)",
    )  # fmt: skip
    option("--max-model-len", type=int, default=core.max_model_len, metavar="TOKENS", help="0: the model's own context")
    option(
        "--max-num-seqs", type=int, default=core.max_num_seqs, metavar="N",
        help="sequences in a batch (default: 64, on a GPU 256)",
    )  # fmt: skip
    option(
        "--max-num-batched-tokens", type=int, default=core.max_num_batched_tokens, metavar="N",
        help="tokens in a step, prompts included (default: 512, on a GPU 8192)",
    )  # fmt: skip
    option(
        "--kv-cache-bytes", type=int, default=core.kv_cache_bytes, metavar="BYTES",
        help="memory for pages (default: 2 GiB, on a GPU what --gpu-memory-utilization leaves)",
    )  # fmt: skip
    option(
        "--kv-cache-dtype", default=core.kv_cache_dtype.value, choices=[dtype.value for dtype in KVCacheDtype],
        help="of keys and values; auto: the model's; fp8: e4m3 without scales, half the memory, on a GPU "
        "(default: %(default)s)",
    )  # fmt: skip
    option(
        "--gpu-memory-utilization", type=float, default=core.gpu_memory_utilization, metavar="SHARE",
        help="of the GPU's memory that may be used (default: %(default)s)",
    )  # fmt: skip
    option("--enforce-eager", action="store_true", help="no CUDA graphs")
    option(
        "--num-pages",
        type=int,
        default=core.num_pages,
        metavar="N",
        help="pages of 16 tokens; 0: what the memory holds",
    )
    option(
        "--prefix-caching", action=argparse.BooleanOptionalAction, default=core.enable_prefix_caching,
        help="keep pages of ended requests for prompts that begin alike",
    )  # fmt: skip
    option(
        "--speculation", default=speculation.value, choices=[speculation.value for speculation in Speculation],
        help="auto: verify what is expected to follow, as far as it makes the batch faster (default: %(default)s)",
    )  # fmt: skip
    option(
        "--num-speculative-tokens", type=int, default=core.num_speculative_tokens, metavar="N",
        help="drafts per request and step, at most (default: %(default)s)",
    )  # fmt: skip
    option(
        "--speculative-model", default=core.speculative_model, metavar="FOLDER",
        help="an EAGLE head for the model, as SafeAILab's EAGLE or speculators write it (default: none, and a GPU "
        "then drafts nothing)",
    )  # fmt: skip
    option(
        "--tensor-parallel-size", type=int, default=core.tensor_parallel_size, metavar="N",
        help="GPUs that share the model; with --device cpu as many processes, which is slow and for trying it out "
        "(default: %(default)s)",
    )  # fmt: skip
    option("--threads", type=int, default=core.threads, metavar="N", help="for the model; 0: one per core")


def add_node_flags(option: Callable[..., Any]) -> None:
    """Where the hosts of an engine on several of them meet."""
    core = CoreConfig()
    option(
        "--nnodes", type=int, default=core.nnodes, metavar="N",
        help="hosts with as many each of the GPUs that share the model (default: %(default)s)",
    )  # fmt: skip
    option(
        "--node-rank",
        type=int,
        default=core.node_rank,
        metavar="RANK",
        help="which of them this is; 0 listens and takes requests, the others take all other flags from it",
    )
    option("--master-addr", default=core.master_addr, metavar="HOST", help="where the others reach host 0")
    option("--master-port", type=int, default=core.master_port, metavar="PORT", help="likewise (default: %(default)s)")
    option(
        "--rendezvous-timeout", type=float, default=core.rendezvous_timeout_s, metavar="SECONDS",
        help="by when all must be there (default: %(default)s)",
    )  # fmt: skip


def core_config(arguments: argparse.Namespace, **others: Any) -> CoreConfig:
    """What those flags ask for, and `others`, which are fields of CoreConfig. Raises ConfigError."""
    return CoreConfig(
        device=Device(arguments.device),
        load_format=LoadFormat(arguments.load_format),
        dtype=Dtype(arguments.dtype),
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        enable_prefix_caching=arguments.prefix_caching,
        num_pages=arguments.num_pages,
        kv_cache_bytes=arguments.kv_cache_bytes,
        kv_cache_dtype=KVCacheDtype(arguments.kv_cache_dtype),
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        enforce_eager=arguments.enforce_eager,
        threads=arguments.threads,
        speculation=Speculation(arguments.speculation),
        num_speculative_tokens=arguments.num_speculative_tokens,
        speculative_model=arguments.speculative_model,
        tensor_parallel_size=arguments.tensor_parallel_size,
        **others,
    )
