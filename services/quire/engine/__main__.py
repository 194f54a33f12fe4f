"""`python -m quire.engine`: one engine pod's server, and the core process behind it."""

from __future__ import annotations

import argparse
import sys

from quire.engine.config import CoreConfig, Device, Dtype, EngineConfig, LoadFormat, Speculation
from quire.engine.service import EngineService
from quire.service.errors import ConfigError
from quire.service.lifecycle import run_service
from quire.service.logs import LogFormat, setup_logging
from quire.service.tls_files import TlsFiles, add_tls_flags

_EXAMPLES = """examples:
  python -m quire.engine --listen 127.0.0.1:9100
  python -m quire.engine --listen unix:/run/quire/engine.sock --sidecar unix:/run/quire/sidecar.sock --dtype float32
  python -m quire.engine --listen 0.0.0.0:9100 --model ./Llama-3.2-1B --max-model-len 8192 --kv-cache-bytes 8000000000
"""


def main(argv: list[str] | None = None) -> int:
    """Parses the flags and serves; returns the exit status."""
    arguments = _parser().parse_args(argv)
    setup_logging(arguments.name, level=arguments.log_level, style=LogFormat(arguments.log_format))
    try:
        config = _config(arguments)
    except ConfigError as error:
        print(f"quire.engine: {error.message}", file=sys.stderr)
        return 2
    return run_service(EngineService(config).run)


def _config(arguments: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        listen=arguments.listen,
        name=arguments.name,
        metrics_port=arguments.metrics_port,
        grace_s=arguments.grace,
        log_level=arguments.log_level,
        log_format=LogFormat(arguments.log_format),
        tls=TlsFiles.of_flags(arguments),
        reload_interval=arguments.reload_interval,
        core=CoreConfig(
            model=arguments.model,
            device=Device(arguments.device),
            load_format=LoadFormat(arguments.load_format),
            dtype=Dtype(arguments.dtype),
            max_model_len=arguments.max_model_len,
            max_num_seqs=arguments.max_num_seqs,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
            max_waiting=arguments.max_waiting,
            enable_prefix_caching=arguments.prefix_caching,
            num_pages=arguments.num_pages,
            kv_cache_bytes=arguments.kv_cache_bytes,
            gpu_memory_utilization=arguments.gpu_memory_utilization,
            enforce_eager=arguments.enforce_eager,
            threads=arguments.threads,
            sidecar=arguments.sidecar,
            speculation=Speculation(arguments.speculation),
            num_speculative_tokens=arguments.num_speculative_tokens,
            speculative_model=arguments.speculative_model,
        ),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m quire.engine",
        description="Runs a model: pages, batches, prefix cache. Routers connect to it over gRPC.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    core = CoreConfig()
    add = parser.add_argument
    add("--listen", required=True, metavar="ADDRESS[,ADDRESS…]", help="HOST:PORT or unix:PATH")
    add("--name", default="engine-0", help="what logs, traces and metrics call it (default: %(default)s)")
    add("--model", default=core.model, help="GGUF file, Hugging Face folder or hub name (default: the embedded model)")
    add("--sidecar", default=core.sidecar, metavar="ADDRESS", help="grammars and drafts; without it no constraints")
    add(
        "--device", default=core.device.value, choices=[device.value for device in Device],
        help="auto: the GPU, if there is one",
    )  # fmt: skip
    add(
        "--load-format", default=core.load_format.value, choices=[format.value for format in LoadFormat],
        help="dummy: random weights for a folder with config.json, to measure speed",
    )  # fmt: skip
    add("--dtype", default=core.dtype.value, choices=[dtype.value for dtype in Dtype], help="float32 is exact")
    add("--max-model-len", type=int, default=core.max_model_len, metavar="TOKENS", help="0: the model's own context")
    add("--max-num-seqs", type=int, default=core.max_num_seqs, help="sequences in a batch (default: 64, on a GPU 256)")
    add(
        "--max-num-batched-tokens", type=int, default=core.max_num_batched_tokens,
        help="tokens in a step, prompts included (default: 512, on a GPU 8192)",
    )  # fmt: skip
    add("--max-waiting", type=int, default=core.max_waiting, help="requests in the queue (default: %(default)s)")
    add(
        "--kv-cache-bytes", type=int, default=core.kv_cache_bytes,
        help="memory for pages (default: 2 GiB, on a GPU what --gpu-memory-utilization leaves)",
    )  # fmt: skip
    add(
        "--gpu-memory-utilization", type=float, default=core.gpu_memory_utilization, metavar="SHARE",
        help="of the GPU's memory that may be used (default: %(default)s)",
    )  # fmt: skip
    add("--enforce-eager", action="store_true", help="no CUDA graphs")
    add("--num-pages", type=int, default=core.num_pages, help="pages of 16 tokens; 0: what the memory holds")
    add(
        "--prefix-caching", action=argparse.BooleanOptionalAction, default=core.enable_prefix_caching,
        help="keep pages of ended requests for prompts that begin alike",
    )  # fmt: skip
    add(
        "--speculation", default=Speculation.AUTO.value, choices=[speculation.value for speculation in Speculation],
        help="auto: verify what the sidecar and grammars expect to follow, as far as it makes the batch faster "
        "(default: %(default)s)",
    )  # fmt: skip
    add(
        "--num-speculative-tokens", type=int, default=core.num_speculative_tokens, metavar="N",
        help="drafts per request and step, at most (default: %(default)s)",
    )  # fmt: skip
    add(
        "--speculative-model", default=core.speculative_model, metavar="FOLDER",
        help="an EAGLE head for the model, as SafeAILab's EAGLE or speculators write it (default: none)",
    )  # fmt: skip
    add("--threads", type=int, default=core.threads, help="threads for the model; 0: one per core")
    add_tls_flags(add, "routers")
    add(
        "--reload-interval", type=float, default=1.0, metavar="SECONDS",
        help="how often these files are looked at (default: %(default)s)",
    )  # fmt: skip
    add("--metrics-port", type=int, default=0, metavar="PORT", help="Prometheus metrics over HTTP; 0: off")
    add("--grace", type=float, default=30.0, metavar="SECONDS", help="for requests in flight at the end")
    add("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    add("--log-format", default="text", choices=[style.value for style in LogFormat])
    return parser


if __name__ == "__main__":
    sys.exit(main())
