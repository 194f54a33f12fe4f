"""The engine's core on a GPU over random weights: throughput, latency, prefill, shared prefixes.

    PYTHONPATH=services:kernels:operator python tests/benchmarks/gpu_engine.py llama-8b --out figures.json
    PYTHONPATH=services:kernels:operator python tests/benchmarks/gpu_engine.py qwen3-0.6b --only one --profile one

Prompts are token ids, decoding is greedy, nothing is detokenized. Shapes are those of the models' public config.json;
lengths and seeds are fixed, so that another engine can be given the same work. Each workload's time is from the first
request to the last token; the run before it, of the same shape, is not counted: it captures graphs. `quire bench
startup` measures the start from the process's begin.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_profile import Profile
from gpu_watch import HostWait, PageWaste, StepGaps, StepTimes, Trace
from told_drafts import ToldDrafts

import quire.kernels.linear
from quire.cli.bench.engine import BenchEngine
from quire.cli.bench.meter import Meter
from quire.cli.bench.prefix import compare_caching
from quire.cli.bench.workloads import Job, Lengths, Work, Workloads
from quire.engine.config import CoreConfig, Device, KVCacheDtype, LoadFormat, Speculation
from quire.engine.core import EngineCore
from quire.engine.gpu.runner import GpuRunner
from quire.engine.loading import LoadedCore, load_core
from quire.engine.models.gpu_linear import GpuLinears
from quire.engine.parallel.leader import Leader
from quire.engine.speculation.stats import SpeculationStats
from quire.kernels.linear_tiles import LinearTile
from quire.service.request import Constraint

MODELS = {
    "llama-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "eos_token_id": 128001,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
        "tie_word_embeddings": True, "eos_token_id": 151645,
    },
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "hidden_act": "silu",
        "tie_word_embeddings": True, "eos_token_id": 2,
    },
}  # fmt: skip

# An EAGLE-3 head as those published for models of this size are.
HEAD = {"num_hidden_layers": 1, "draft_vocab_size": 32000, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Workload:
    """`warm` is run before it."""

    name: str
    make: Callable[[], Work]
    warm: Callable[[], Work] | None = None


# Of a model with fewer tokens, prompts are of their remainders.
PROMPTS = Workloads(100_000)
fixed, shared_prefix = PROMPTS.fixed, PROMPTS.shared_prefix


def mixed(count: int, seed: int, lo: int = 100, hi: int = 1024) -> Work:
    return PROMPTS.mixed(count, Lengths(lo, hi), Lengths(lo, hi), seed)


# The first prompt of `eight` is that of `one`, and so in the cache: the runs before them are alike in that, too.
WORKLOADS = [
    Workload("one", lambda: fixed(1, 128, 256, 1), lambda: fixed(1, 128, 16, 22)),
    Workload("eight", lambda: fixed(8, 128, 256, 1), lambda: fixed(8, 128, 16, 22)),
    Workload("sixtyfour", lambda: fixed(64, 512, 256, 5), lambda: fixed(64, 512, 16, 23)),
    Workload("prefill", lambda: fixed(16, 2048, 1, 6), lambda: fixed(16, 2048, 1, 26)),
    Workload("mixed256", lambda: mixed(256, 0), lambda: mixed(256, 77, 16, 300)),
    Workload("prefix cold", lambda: shared_prefix(256, 2048, 64, 64, 2)),
    Workload("prefix warm", lambda: shared_prefix(256, 2048, 64, 64, 2)),
    Workload("mixed1024", lambda: mixed(1024, 3)),
]


def measure(
    core: EngineCore,
    work: Work,
    salt: str = "",
    constraint: Constraint | None = None,
    each_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The figures of one run. Prompts that were run with another salt are not in the cache."""
    work = [Job([token % core.vocab_size for token in job.prompt], job.output_len) for job in work]
    with HostWait() as waited:
        run = Meter(core, each_step).run(work, constraint=constraint, salt=salt)
    assert run.output_tokens == sum(job.output_len for job in work)
    return {
        "s": round(run.seconds, 4), "out_tok_s": round(run.output_tokens_per_second, 1),
        "in_tok_s": round(run.input_tokens / run.seconds, 1), "ms_per_token": round(1e3 * run.seconds_per_token, 3),
        "steps": run.steps, "host_busy": round(1 - waited.seconds / run.seconds, 3), "preemptions": run.preemptions,
    }  # fmt: skip


def drafted(stats: SpeculationStats) -> dict[str, int]:
    """How many drafts were verified, and how many of them were right."""
    return {"verified": sum(stats.verified.values()), "right": sum(stats.accepted.values())}


def caching(core: EngineCore, loaded: LoadedCore, rounds: int) -> dict[str, list[float]]:
    """Seconds for 256 requests whose prompts share nothing, with prefix caching and without, in turns.

    The run before them captures graphs.
    """
    engine = BenchEngine(core, loaded.ready, Meter(core), PROMPTS)
    work = mixed(256, 499, 200, 300)
    engine.run(work, "warm-up")
    off, on = compare_caching(engine, work, rounds)
    return {"on": [round(run.seconds, 4) for run in on], "off": [round(run.seconds, 4) for run in off]}


def prefetch_all(prefetch: int) -> None:
    """Has every tile ask for so much of each row of its weight."""
    found = quire.kernels.linear.tile_for

    def tile_for(*arguments: Any) -> LinearTile | None:
        tile = found(*arguments)
        return None if tile is None else replace(tile, prefetch=prefetch)

    quire.kernels.linear.tile_for = tile_for


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", choices=MODELS)
    add("--only", default="", help="comma-separated names of workloads (default: all)")
    add("--no-prefix-caching", action="store_true")
    add("--max-num-seqs", type=int, default=256)
    add("--max-num-batched-tokens", type=int, default=None)
    add("--max-mixed-tokens", type=int, default=None)
    add("--kv-cache-dtype", choices=[dtype.value for dtype in KVCacheDtype], default="auto")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs that share the model")
    add("--cublas", action="store_true", help="also for products of few rows")
    add("--prefetch", type=int, default=None, help="elements of each row of a weight, for all tiles")
    add("--rehearse", action="store_true", help="what is run before a workload is the workload itself")
    add(
        "--prepare-seconds", type=float, default=math.inf, metavar="S",
        help="for graphs that are captured before the first workload; others are when one wants them (default: all)",
    )  # fmt: skip
    add("--trace", action="store_true", help="shows steps of one token a sequence beside their floor")
    add("--profile", default="", help="workload whose steady steps are profiled")
    add("--gaps", action="store_true", help="the GPU's idle time between steps")
    add("--waste", action="store_true", help="slots of granted pages without a token, on mixed1024")
    add("--caching", type=int, default=0, metavar="ROUNDS", help="prefix caching without hits, on and off")
    add("--drafts", type=int, default=0, metavar="K", help="verified of a sequence and step, at most")
    add(
        "--accept", type=float, nargs="+", default=[], metavar="TOKENS",
        help="synthetic acceptance: each workload once for so many tokens a step and sequence on average where K "
        "drafts are verified; 1: all are wrong (default: no drafts)",
    )  # fmt: skip
    add("--head", action="store_true", help="an EAGLE-3 head makes the drafts: else they cost no time")
    add("--step-times", type=Path, help="where what the budget was told of each step with drafts goes, as JSON")
    add("--skip", type=int, default=40, help="steps before the profile (default: %(default)s)")
    add("--out", type=Path, help="where figures go as JSON")
    arguments = parser.parse_args()
    if arguments.accept and arguments.tensor_parallel_size > 1:
        parser.error("--accept is of one GPU's: others would count which drafts are right themselves")
    return arguments


def load(arguments: argparse.Namespace) -> LoadedCore:
    """With random weights."""
    if arguments.cublas:
        GpuLinears.on = classmethod(lambda cls, device, dtype: cls(device, dtype, None))  # type: ignore[method-assign,assignment]
    if arguments.prefetch is not None:
        prefetch_all(arguments.prefetch)
    if arguments.accept:
        # What is drawn says nothing of second choices.
        CoreConfig.num_siblings = property(lambda config: 0)  # type: ignore[assignment,method-assign]
    shape = MODELS[arguments.model]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        head = Path(folder) / "head"
        head.mkdir()
        (head / "config.json").write_text(json.dumps(shape | HEAD | {"target_hidden_size": shape["hidden_size"]}))
        config = CoreConfig(
            model=folder, device=Device.CUDA, load_format=LoadFormat.DUMMY, max_model_len=4096,
            max_num_seqs=arguments.max_num_seqs, max_num_batched_tokens=arguments.max_num_batched_tokens,
            max_mixed_tokens=arguments.max_mixed_tokens, kv_cache_dtype=KVCacheDtype(arguments.kv_cache_dtype),
            max_waiting=100000, enable_prefix_caching=not arguments.no_prefix_caching,
            speculation=Speculation.AUTO if arguments.drafts else Speculation.OFF,
            num_speculative_tokens=arguments.drafts or 1,
            speculative_model=str(head) if arguments.head else "",
            tensor_parallel_size=arguments.tensor_parallel_size,
        )  # fmt: skip
        return load_core(config, lambda *_: None)


def measure_all(
    core: EngineCore, runner: GpuRunner, told: ToldDrafts, arguments: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures of each workload, once for each acceptance."""
    wanted = [name for name in arguments.only.split(",") if name]
    for workload in WORKLOADS:
        if wanted and workload.name not in wanted:
            continue
        for length in arguments.accept or [None]:
            told.tell(length, arguments.drafts)
            if workload.warm is not None:
                measure(core, workload.make() if arguments.rehearse else workload.warm(), salt="before")
            work, gaps = workload.make(), StepGaps(runner) if arguments.gaps else None
            trace = Trace(core) if arguments.trace else None
            with StepTimes() as times:
                found = measure(core, work, str(length), each_step=trace or (lambda: None))
            if arguments.step_times is not None:
                with arguments.step_times.open("a") as file:
                    file.write(json.dumps({"workload": workload.name, "accept": length, "steps": times.told}) + "\n")
            if core.stats.speculation is not None:
                found["drafts"] = drafted(core.stats.speculation)
            if gaps is not None:
                found["idle between steps"] = round(gaps.share(), 5)
            made = "by a head" if arguments.head else "without a head's time"
            told_of = "" if length is None else f", {arguments.drafts} drafts {made}, {length:g} a step"
            yield f"{workload.name}{told_of}", found
            if trace is not None:
                trace.show(MODELS[arguments.model])


def main() -> None:
    arguments = parse()
    loaded = load(arguments)
    core, runner = loaded.core, loaded.core._runner
    if isinstance(runner, Leader):
        runner = runner.runner
    assert isinstance(runner, GpuRunner)
    told = ToldDrafts(core, runner)
    told.tell(None, arguments.drafts)
    began = time.perf_counter()
    measure(core, fixed(1, 8, 1, 9))
    start = {**loaded.ready.start_seconds, "first token": time.perf_counter() - began}
    figures: dict[str, object] = {
        "device": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
        "model": arguments.model, "tensor_parallel_size": arguments.tensor_parallel_size,
        "pages": loaded.ready.num_pages,
        "start_s": {name: round(seconds, 2) for name, seconds in start.items()},
    }  # fmt: skip
    began, more = time.perf_counter(), True
    while more and time.perf_counter() - began < arguments.prepare_seconds:
        more = core.prepare()
    figures["graphs captured after s more"] = round(time.perf_counter() - began, 2)
    print(json.dumps(figures), flush=True)
    for name, found in measure_all(core, runner, told, arguments):
        figures[name] = found
        print(name, json.dumps(found), flush=True)
    for name in [name for name in arguments.profile.split(",") if name]:
        print("profile of", name)
        told.tell(arguments.accept[0] if arguments.accept else None, arguments.drafts)
        work = next(workload for workload in WORKLOADS if workload.name == name).make()
        measure(core, work, "profile", each_step=Profile(arguments.skip, 20))
    if arguments.waste:
        waste = PageWaste(core)
        measure(core, mixed(1024, 4), each_step=waste)
        figures["waste"] = round(waste.share, 4)
        print("KV waste on mixed1024", figures["waste"], flush=True)
    if arguments.caching:
        figures["caching"] = caching(core, loaded, arguments.caching)
        print("prefix caching, s", figures["caching"], flush=True)
    core.close()
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
