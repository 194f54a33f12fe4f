"""What the paged cache costs: memory that holds no token, and time spent on prefixes that nobody shares.

    python tests/benchmarks/cache_cost.py
    python tests/benchmarks/cache_cost.py --requests 1000 --sequences 256

Prompts and outputs are uniformly 100 to 1,024 random tokens, so that no two prefixes are alike. The model does nothing:
all of the time is the engine's own. Runs with and without prefix caching take turns, and the least time of each counts.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass

import torch
from step_overhead import VOCAB_SIZE, NoModel

from quire.engine.core import EngineCore
from quire.engine.cpu_runner import CpuRunner
from quire.engine.page_pool import PagePool
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.engine.sequence import SequenceState
from quire.service.pages import PAGE_SIZE
from quire.service.request import Request, SamplingParams, StopConditions

SHORTEST, LONGEST = 100, 1024


@dataclass(frozen=True)
class Run:
    """Seconds are the core's; waste is the share of token places in referenced pages that hold none, over all steps."""

    seconds: float
    waste: float
    tokens: int
    hits: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=400, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=64, metavar="N", help="running (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="(default: %(default)s)")
    arguments = parser.parse_args()
    on, off = [], []
    for _ in range(arguments.repeats):
        on.append(run(arguments.requests, arguments.sequences, caching=True))
        off.append(run(arguments.requests, arguments.sequences, caching=False))
    waste, hits, tokens = on[0].waste, on[0].hits, on[0].tokens
    cost = (min(each.seconds for each in on) - min(each.seconds for each in off)) / tokens
    print(f"{arguments.requests} requests, {tokens} tokens computed, {hits} of them found in the cache")
    print(f"KV memory that held no token: {waste:.2%}")
    print(
        f"prefix caching at no hits: {1e6 * cost:.2f} µs a token: {cost * 1000:.2%} of the time at 1,000 tokens/s",
        end=", ",
    )
    print(f"{cost * 10_000:.2%} at 10,000")


def run(num_requests: int, num_sequences: int, *, caching: bool) -> Run:
    """All requests at once through one core."""
    num_pages = num_sequences * (2 * LONGEST // PAGE_SIZE + 1)
    config = SchedulerConfig(num_sequences, 2048, 2 * LONGEST + 1, num_requests, enable_prefix_caching=caching)
    model = NoModel(torch.rand(num_sequences, VOCAB_SIZE))
    runner = CpuRunner(model, num_pages, num_sequences, config.max_model_len, "float32")  # type: ignore[arg-type]
    scheduler = Scheduler(config, PagePool(num_pages), frozenset())
    core = EngineCore(runner, scheduler, None, VOCAB_SIZE)
    chance = random.Random(0)
    seconds, used, filled = 0.0, 0, 0
    for key in range(num_requests):
        prompt = tuple(chance.randrange(VOCAB_SIZE) for _ in range(chance.randint(SHORTEST, LONGEST)))
        stop = StopConditions(chance.randint(SHORTEST, LONGEST), ignore_eos=True)
        request = Request(str(key), "none", prompt, SamplingParams(temperature=0.0), stop)
        began = time.perf_counter()
        core.submit(key, request)
        seconds += time.perf_counter() - began
    while core.has_work:
        began = time.perf_counter()
        core.step()
        scheduler.pool.drain_events()
        seconds += time.perf_counter() - began
        running = [sequence for sequence in scheduler if sequence.state is SequenceState.RUNNING]
        used += sum(len(sequence.block_table) for sequence in running) * PAGE_SIZE
        filled += sum(sequence.num_computed for sequence in running)
    return Run(seconds, 1 - filled / used, core.stats.computed_tokens, core.stats.cached_prompt_tokens)


if __name__ == "__main__":
    main()
