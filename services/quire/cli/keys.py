"""`quire keys`: makes API keys for a gateway, and checks the file that holds their hashes."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta

from quire.cli.flags import Parser
from quire.gateway.access.keys import KeyLine, digest_of, line_for, load_keys, new_key
from quire.service.errors import ConfigError

_DESCRIPTION = """\
Draws a key and prints it on standard error, once; on standard output it prints
the line for the gateway's --api-keys file, which holds only the key's hash."""

_EXAMPLES = """\
  quire keys --tenant acme
      a key without limits; append `>> keys.jsonl` to put its line into a file.
      Its holder sends it as `Authorization: Bearer KEY`
  quire keys --tenant acme --requests-per-minute 600 --concurrency 16 --days 90
      one with limits, for ninety days
  quire keys --check keys.jsonl
      whether a gateway would take this file"""


def main(argv: list[str]) -> int:
    """Prints a key and its line, or checks a file. Raises ConfigError."""
    arguments = _parser().parse_args(argv)
    if arguments.check:
        print(f"{arguments.check}: {len(load_keys(arguments.check))} keys")
        return 0
    if not arguments.tenant:
        raise ConfigError("--tenant is missing: say whom the key is for", field="tenant")
    key = new_key()
    line = line_for(
        KeyLine(
            hash=f"sha256:{digest_of(key).hex()}",
            tenant=arguments.tenant,
            name=arguments.name,
            requests_per_minute=arguments.requests_per_minute,
            tokens_per_minute=arguments.tokens_per_minute,
            concurrency=arguments.concurrency,
            models=arguments.model or None,
            expires=_in_days(arguments.days),
            max_priority=arguments.max_priority,
        )
    )
    print(line, flush=True)
    print(f"the key, which is shown only now: {key}", file=sys.stderr)
    return 0


def _in_days(days: float | None) -> datetime | None:
    return None if days is None else (datetime.now(UTC) + timedelta(days=days)).replace(microsecond=0)


def _parser() -> Parser:
    parser = Parser("keys", _DESCRIPTION, _EXAMPLES)
    add = parser.add_argument
    add("--tenant", default="", metavar="NAME", help="tenants never share cached pages")
    add("--name", default="", help="a label for people")
    add("--requests-per-minute", type=int, metavar="N", help="(default: no limit)")
    add("--tokens-per-minute", type=int, metavar="N", help="of prompts and outputs (default: no limit)")
    add("--concurrency", type=int, metavar="N", help="requests in flight (default: no limit)")
    add("--model", action="append", metavar="NAME", help="it may ask for; repeat it for more (default: all)")
    add("--days", type=float, metavar="N", help="until it expires (default: never)")
    add("--max-priority", type=int, default=0, metavar="N", help="it may ask for (default: %(default)s)")
    add("--check", default="", metavar="FILE", help="reads a file as a gateway would, and no more")
    return parser
