"""What a step costs beside the model: scheduling, pages, batch preparation, sampling, bookkeeping.

    python tests/benchmarks/step_overhead.py
    python tests/benchmarks/step_overhead.py --sequences 64 --profile 20

Measured with a model that does nothing but hand out logits over a small vocabulary, greedily sampled.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.engine.core import EngineCore
from quire.engine.cpu_runner import CpuRunner
from quire.engine.models.model import ForwardBatch, HiddenTaps, KVCache
from quire.engine.page_pool import PagePool
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.service.request import Request, SamplingParams, StopConditions

VOCAB_SIZE = 1024


@dataclass
class NoModel:
    """`quire.engine.models.model.Model` as far as a runner uses it."""

    logits: Tensor

    def new_kv_cache(self, num_pages: int) -> KVCache:
        return KVCache(())

    def forward(self, batch: ForwardBatch, cache: KVCache, taps: HiddenTaps | None = None) -> Tensor:
        return self.logits[: batch.logit_rows.shape[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256, metavar="N", help="running (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=512, metavar="TOKENS", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="measured (default: %(default)s)")
    parser.add_argument("--profile", type=int, default=0, metavar="LINES", help="shows where the time goes")
    arguments = parser.parse_args()
    core = loaded_core(arguments.sequences, arguments.prompt, arguments.steps)
    profile = cProfile.Profile()
    seconds = []
    if arguments.profile:
        profile.enable()
    for _ in range(arguments.steps):
        began = time.perf_counter()
        core.step()
        seconds.append(time.perf_counter() - began)
    if arguments.profile:
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(arguments.profile)
    milliseconds = sorted(1000 * second for second in seconds)
    p99 = milliseconds[len(milliseconds) * 99 // 100]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.sequences} decoding sequences: "
        f"median {statistics.median(milliseconds):.2f} ms a step, p99 {p99:.2f} ms"
    )


def loaded_core(num_sequences: int, num_prompt_tokens: int, num_steps: int) -> EngineCore:
    """A core in which every sequence decodes."""
    max_model_len = num_prompt_tokens + num_steps + 64
    config = SchedulerConfig(num_sequences, max_num_batched_tokens=8192, max_model_len=max_model_len)
    num_pages = num_sequences * (max_model_len // 16 + 1)
    logits = torch.rand(num_sequences, VOCAB_SIZE)
    runner = CpuRunner(NoModel(logits), num_pages, num_sequences, max_model_len, "float32")  # type: ignore[arg-type]
    core = EngineCore(runner, Scheduler(config, PagePool(num_pages), frozenset()), None, VOCAB_SIZE)
    for key in range(num_sequences):
        prompt = tuple((key * 31 + i * 7) % VOCAB_SIZE for i in range(num_prompt_tokens))
        stop = StopConditions(num_steps + 50, ignore_eos=True)
        core.submit(key, Request(str(key), "none", prompt, SamplingParams(temperature=0.0), stop))
    while core.scheduler.num_pending_prefill_tokens:
        core.step()
    return core


if __name__ == "__main__":
    main()
