"""`python -m quire.sidecar`: grammars and drafts for the engine of its pod."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from quire.service.errors import ConfigError
from quire.service.lifecycle import run_service
from quire.service.logs import LogFormat, setup_logging
from quire.sidecar.config import CacheLimits, GrammarLimits, MaskLimits, SidecarConfig
from quire.sidecar.drafting.drafter import DraftingLimits
from quire.sidecar.service import serve

_EXAMPLES = """\
examples:
  python -m quire.sidecar --listen unix:/run/quire/sidecar.sock
  python -m quire.sidecar --listen 127.0.0.1:9100 --model ./SmolLM2-135M-Instruct.Q4_1.gguf --metrics-port 9101
  python -m quire.sidecar --listen unix:/run/quire/sidecar.sock --compile-seconds 5 --log-format json
"""


def main(argv: list[str] | None = None) -> int:
    """Parses the flags and serves; returns the exit status."""
    arguments = _parser().parse_args(argv)
    setup_logging(arguments.name, level=arguments.log_level, style=LogFormat(arguments.log_format))
    try:
        config = _config(arguments)
    except ConfigError as error:
        print(f"quire.sidecar: {error.message}", file=sys.stderr)
        return 2
    return run_service(partial(serve, config))


def _config(arguments: argparse.Namespace) -> SidecarConfig:
    return SidecarConfig(
        listen=arguments.listen,
        name=arguments.name,
        model=arguments.model,
        limits=GrammarLimits(arguments.compile_seconds, arguments.compile_mib, arguments.source_bytes),
        masks=MaskLimits(arguments.mask_seconds, arguments.mask_step_seconds, arguments.mask_token_seconds),
        cache=CacheLimits(arguments.cache_entries, arguments.cache_mib),
        drafting=DraftingLimits(
            arguments.drafting_sequence_tokens, arguments.drafting_tenant_tokens, arguments.drafting_total_tokens
        ),
        compile_workers=arguments.compile_workers,
        mask_threads=arguments.mask_threads,
        metrics_port=arguments.metrics_port,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m quire.sidecar",
        description="Turns JSON Schema, regular expressions and Lark grammars into token masks for an engine, "
        "and what was said before into drafts of what may follow.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    limits, masks, cache, config = GrammarLimits(), MaskLimits(), CacheLimits(), SidecarConfig(listen="unix:")
    drafting = DraftingLimits()
    add = parser.add_argument
    add("--listen", required=True, metavar="ADDRESS", help="HOST:PORT or unix:PATH")
    add("--name", default=config.name, help="what logs and traces call it (default: %(default)s)")
    add("--model", default="", help="GGUF file, Hugging Face folder or hub name (default: the embedded model)")
    add(
        "--compile-seconds", type=float, default=limits.compile_seconds, metavar="SECONDS",
        help="a constraint that takes longer to compile is refused (default: %(default)s)",
    )  # fmt: skip
    add(
        "--compile-mib", type=int, default=limits.compile_mib, metavar="MIB",
        help="and one that takes more memory (default: %(default)s)",
    )  # fmt: skip
    add(
        "--source-bytes", type=int, default=limits.source_bytes, metavar="BYTES",
        help="and one whose text is longer (default: %(default)s)",
    )  # fmt: skip
    add("--compile-workers", type=int, default=config.compile_workers, help="compiled at once (default: %(default)s)")
    add(
        "--cache-entries", type=int, default=cache.entries, metavar="N",
        help="compiled grammars that are kept (default: %(default)s)",
    )  # fmt: skip
    add(
        "--cache-mib", type=int, default=cache.mib, metavar="MIB",
        help="and the memory that they may take (default: %(default)s)",
    )  # fmt: skip
    add(
        "--mask-seconds", type=float, default=masks.row_seconds, metavar="SECONDS",
        help="a step waits this long for a mask; a request whose is late ends (default: %(default)s)",
    )  # fmt: skip
    add(
        "--mask-step-seconds", type=float, default=masks.step_seconds, metavar="SECONDS",
        help="and this long for all of them (default: %(default)s)",
    )  # fmt: skip
    add(
        "--mask-token-seconds", type=float, default=masks.token_seconds, metavar="SECONDS",
        help="CPU time of a request's masks, a token, with --mask-seconds to begin with (default: %(default)s)",
    )  # fmt: skip
    add("--mask-threads", type=int, default=config.mask_threads, help="threads for masks; 0: one per core")
    add(
        "--drafting-sequence-tokens", type=int, default=drafting.sequence_tokens, metavar="TOKENS",
        help="drafts: of a request so many are remembered, of 100 to 150 bytes each (default: %(default)s)",
    )  # fmt: skip
    add(
        "--drafting-tenant-tokens", type=int, default=drafting.tenant_tokens, metavar="TOKENS",
        help="of a tenant's ended outputs (default: %(default)s)",
    )  # fmt: skip
    add(
        "--drafting-total-tokens", type=int, default=drafting.total_tokens, metavar="TOKENS",
        help="of all requests, and as many of all ended outputs (default: %(default)s)",
    )  # fmt: skip
    add("--metrics-port", type=int, default=config.metrics_port, metavar="PORT", help="Prometheus over HTTP; 0: off")
    add("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    add("--log-format", default="text", choices=[style.value for style in LogFormat])
    return parser


if __name__ == "__main__":
    sys.exit(main())
