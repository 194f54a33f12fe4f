"""What the router's prefix index costs: time to look a prompt up, memory of a page, time to take a snapshot.

    python tests/benchmarks/prefix_index.py
    python tests/benchmarks/prefix_index.py --pages 4000000 --engines 64 --holders 8

Each page is held by `--holders` of the `--engines`, drawn at random for each prompt of `--tokens` tokens. A lookup
that finds everything is the longest that there is; one that finds nothing ends at the first page. Hashing the prompt is
given beside it: a router does it once for a request. Times are this thread's on the processor, so that other work
on the machine does not show in them. Memory is what the interpreter allocated for the index (tracemalloc), everything
included; 1,400,000 pages are just after the index has doubled, which is its worst case.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np

from quire.router.index import SLICE, CacheReplica, PrefixIndex, page_keys
from quire.service.pages import HASH_BYTES, PAGE_SIZE, prefix_hashes
from quire.service.request import CacheKey

_REPEATS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--pages", type=int, nargs="*", default=[1_000_000, 1_400_000, 2_000_000], help="(default: %(default)s)")
    option("--engines", type=int, default=16, metavar="N", help="(default: %(default)s)")
    option("--holders", type=int, default=2, metavar="N", help="engines that hold a page (default: %(default)s)")
    option("--tokens", type=int, default=4000, metavar="N", help="in a prompt (default: %(default)s)")
    arguments = parser.parse_args()
    if not 1 <= arguments.holders <= arguments.engines:
        parser.error(f"--holders is {arguments.holders}: it must lie in [1, --engines]")
    if arguments.tokens < PAGE_SIZE or min(arguments.pages, default=0) < arguments.tokens // PAGE_SIZE:
        parser.error("--tokens must be a page at least, and --pages a prompt at least")
    print(f"prompts of {arguments.tokens:,} tokens, {arguments.engines} engines, {arguments.holders} hold each page")
    columns = ("pages", "bytes/page", "found: p50", "p99", "not found", "hashing", "snapshot", "longest slice")
    print("".join(f"{column:>15}" for column in columns))
    for pages in arguments.pages:
        print("".join(f"{cell:>15}" for cell in measure(pages, arguments.engines, arguments.holders, arguments.tokens)))


def measure(pages: int, engines: int, holders: int, tokens: int) -> list[str]:
    """One row of the table."""
    chance = random.Random(0)
    per_prompt = tokens // PAGE_SIZE
    hashes = np.random.default_rng(0).bytes(pages * HASH_BYTES)
    prompts = [hashes[start : start + per_prompt * HASH_BYTES] for start in _starts(pages, per_prompt)]
    gc.collect()
    tracemalloc.start()
    index = PrefixIndex()
    ids = [index.open() for _ in range(engines)]
    for prompt in prompts:
        for holder in chance.sample(ids, holders):
            index.store(holder, page_keys(prompt))
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    asked = [page_keys(chance.choice(prompts)) for _ in range(_REPEATS)]
    unknown = [page_keys(np.random.default_rng(each).bytes(per_prompt * HASH_BYTES)) for each in range(100)]
    found = [_microseconds(lambda: index.match(keys)) for keys in asked if len(keys) == per_prompt]  # noqa: B023
    not_found = [_microseconds(lambda: index.match(keys)) for keys in unknown]  # noqa: B023
    token_ids = tuple(range(tokens))
    hashing = [_microseconds(lambda: page_keys(b"".join(prefix_hashes(CacheKey(), token_ids)))) for _ in range(200)]
    whole, longest = _snapshot(index, hashes)
    return [
        f"{len(index):,}", f"{memory / len(index):.1f}", *_quantiles(found), f"{statistics.median(not_found):.1f} µs",
        f"{statistics.median(hashing):.0f} µs", f"{whole:.2f} s", f"{1000 * longest:.1f} ms",
    ]  # fmt: skip


def _starts(pages: int, per_prompt: int) -> Sequence[int]:
    return range(0, pages * HASH_BYTES, per_prompt * HASH_BYTES)


def _microseconds(do: Callable[[], object]) -> float:
    began = time.thread_time()
    do()
    return 1e6 * (time.thread_time() - began)


def _quantiles(times: list[float]) -> tuple[str, str]:
    quantiles = statistics.quantiles(times, n=100)
    return f"{quantiles[49]:.1f} µs", f"{quantiles[98]:.1f} µs"


def _snapshot(index: PrefixIndex, hashes: bytes) -> tuple[float, float]:
    """Seconds for one more engine's snapshot of all pages, and for the longest slice of it that the loop waits for."""
    began = last = time.thread_time()
    longest = 0.0
    for _ in CacheReplica(index).snapshot(1, 1, hashes, SLICE):
        now = time.thread_time()
        longest, last = max(longest, now - last), now
    return time.thread_time() - began, longest


if __name__ == "__main__":
    main()
