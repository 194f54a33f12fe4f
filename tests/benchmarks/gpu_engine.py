"""The engine's core on a GPU over random weights: throughput, latency, prefill, shared prefixes, start-up.

    PYTHONPATH=services:kernels:operator python tests/benchmarks/gpu_engine.py llama-8b --out figures.json
    PYTHONPATH=services:kernels:operator python tests/benchmarks/gpu_engine.py qwen3-0.6b --only one --profile

Prompts are token ids, decoding is greedy, nothing is detokenized. Shapes are those of the models' public config.json;
lengths and seeds are fixed, so that another engine can be given the same work. Each workload's time is from the first
request to the last token; the run before it, of the same shape, is not counted: it captures graphs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()

import torch  # noqa: E402
from told_drafts import ToldDrafts  # noqa: E402

import quire.kernels.linear  # noqa: E402
from quire.cli.bench.workloads import Job, Lengths, Work, Workloads  # noqa: E402
from quire.engine.config import CoreConfig, Device, LoadFormat, Speculation  # noqa: E402
from quire.engine.core import EngineCore  # noqa: E402
from quire.engine.gpu.runner import GpuPendingStep, GpuRunner  # noqa: E402
from quire.engine.loading import load_core  # noqa: E402
from quire.engine.models.gpu_linear import GpuLinears  # noqa: E402
from quire.engine.parallel.leader import Leader  # noqa: E402
from quire.engine.plan import StepPlan  # noqa: E402
from quire.engine.speculation.speculator import SpeculationStats  # noqa: E402
from quire.kernels.linear_tiles import LinearTile  # noqa: E402
from quire.service.pages import PAGE_SIZE  # noqa: E402
from quire.service.request import CacheKey, Constraint, Request, SamplingParams, StopConditions  # noqa: E402

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
}  # fmt: skip

# An EAGLE-3 head as those published for models of this size are.
HEAD = {"num_hidden_layers": 1, "draft_vocab_size": 32000, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Workload:
    """`warm` is run before it."""

    name: str
    make: Callable[[], Work]
    warm: Callable[[], Work] | None = None


class HostWait:
    """How long the host waits for the GPU: what is left of the time is Python's."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._synchronize = torch.cuda.Event.synchronize
        torch.cuda.Event.synchronize = lambda event: self._timed(event)  # type: ignore[method-assign]

    def stop(self) -> None:
        torch.cuda.Event.synchronize = self._synchronize  # type: ignore[method-assign]

    def _timed(self, event: torch.cuda.Event) -> None:
        began = time.perf_counter()
        self._synchronize(event)
        self.seconds += time.perf_counter() - began


class StepGaps:
    """How long the GPU has nothing to do between two steps: from one's last operation to the next one's first."""

    def __init__(self, runner: GpuRunner) -> None:
        self._runner = runner
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._launch = runner.launch
        runner.launch = self._timed  # type: ignore[method-assign]

    def share(self) -> float:
        """Of the time from the first step's begin to the last one's end; stops measuring."""
        self._runner.launch = self._launch  # type: ignore[method-assign]
        torch.cuda.synchronize()
        if len(self._events) < 2:
            return 0.0
        idle = sum(before[1].elapsed_time(after[0]) for before, after in pairwise(self._events))
        return idle / self._events[0][0].elapsed_time(self._events[-1][1])

    def _timed(self, plan: StepPlan, *, masked: bool) -> GpuPendingStep:
        events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        events[0].record(self._runner._stream)
        step = self._launch(plan, masked=masked)
        events[1].record(self._runner._stream)
        self._events.append(events)
        return step


@dataclass(frozen=True)
class Step:
    """What a step took, in seconds, and did."""

    seconds: float
    tokens: int
    sequences: int
    context: int


def print_trace(trace: list[Step], shape: dict[str, Any]) -> None:
    """Groups of steps by their tokens: how long they took, and the bytes that they read over that time."""
    layers, hidden, head = shape["num_hidden_layers"], shape["hidden_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    weights = layers * (2 * hidden * head * (heads + kv_heads) + 3 * hidden * shape["intermediate_size"])
    weights += shape["vocab_size"] * hidden
    groups: dict[int, list[Step]] = {}
    for step in trace:
        groups.setdefault(min(step.tokens.bit_length(), 13), []).append(step)
    for _, steps in sorted(groups.items()):
        seconds = sum(step.seconds for step in steps)
        read = sum(2 * weights + 4 * layers * kv_heads * head * step.context for step in steps)
        print(
            f"  {len(steps):5} steps of {min(s.tokens for s in steps):5} to {max(s.tokens for s in steps):5} tokens: "
            f"{1e3 * seconds / len(steps):8.3f} ms each, {seconds:7.3f} s in all, {read / seconds / 1e12:5.2f} TB/s"
        )


# Both models have more tokens than the prompts are of.
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


def run(
    core: EngineCore,
    work: Work,
    first_key: int,
    trace: list[Step] | None = None,
    constraint: Constraint | None = None,
    salt: str = "",
) -> dict[str, Any]:
    """Submits everything at once and steps until it is done; `trace` gets every step. Prompts that were run with
    another salt are not in the cache."""
    waited = HostWait()
    began = time.perf_counter()
    for index, (prompt, output) in enumerate(work):
        key, stop = first_key + index, StopConditions(output, ignore_eos=constraint is None)
        request = Request(
            str(key), "m", tuple(prompt), SamplingParams(temperature=0.0), stop, constraint=constraint,
            cache_key=CacheKey(salt),
        )  # fmt: skip
        core.submit(key, request)
    tokens = steps = 0
    last, preempted = began, core.scheduler.num_preemptions
    while core.has_work:
        steps += 1
        computed = core.stats.computed_tokens
        for update in core.step():
            tokens += len(update.token_ids)
        if trace is not None:
            now = time.perf_counter()
            context = sum(sequence.num_computed for sequence in core.scheduler)
            trace.append(Step(now - last, core.stats.computed_tokens - computed, core.scheduler.num_running, context))
            last = now
    seconds = time.perf_counter() - began
    waited.stop()
    inputs = sum(len(prompt) for prompt, _ in work)
    assert tokens == sum(output for _, output in work)
    return {
        "s": round(seconds, 4), "out_tok_s": round(tokens / seconds, 1), "in_tok_s": round(inputs / seconds, 1),
        "ms_per_token": round(1e3 * seconds / max(output for _, output in work), 3), "steps": steps,
        "host_busy": round(1 - waited.seconds / seconds, 3),
        "preemptions": core.scheduler.num_preemptions - preempted,
    }  # fmt: skip


def drafted(stats: SpeculationStats) -> dict[str, int]:
    """How many drafts were verified, and how many of them were right."""
    return {"verified": sum(stats.verified.values()), "right": sum(stats.accepted.values())}


def waste(core: EngineCore, work: Work, first_key: int) -> float:
    """The share of slots in granted pages that hold no token, over all steps."""
    for index, (prompt, output) in enumerate(work):
        stop = StopConditions(output, ignore_eos=True)
        core.submit(first_key + index, Request("w", "m", tuple(prompt), SamplingParams(temperature=0.0), stop))
    granted = used = 0
    while core.has_work:
        core.step()
        running = [sequence for sequence in core.scheduler if sequence.block_table]
        granted += sum(len(sequence.block_table) * PAGE_SIZE for sequence in running)
        used += sum(sequence.num_computed for sequence in running)
    return 1 - used / granted


def compare_caching(core: EngineCore, first_key: int, rounds: int) -> dict[str, list[float]]:
    """Seconds for 256 requests whose prompts share nothing, with prefix caching and without, in turns.

    The run before them captures graphs.
    """
    config, found = core.scheduler.config, dict[str, list[float]](on=[], off=[])
    run(core, mixed(256, 499, 200, 300), first_key - 1000)
    for turn in range(2 * rounds):
        name = "off" if turn % 4 in (1, 2) else "on"
        core.scheduler.config = replace(config, enable_prefix_caching=name == "on")
        found[name].append(run(core, mixed(256, 500 + turn, 200, 300), first_key + 1000 * turn)["s"])
    core.scheduler.config = config
    return found


def profile(core: EngineCore, work: Work, first_key: int, skip: int, steps: int) -> None:
    """Prints where the GPU's time goes in `steps` steps after the first `skip`, and how much of it is idle."""
    for index, (prompt, output) in enumerate(work):
        stop = StopConditions(output, ignore_eos=True)
        core.submit(first_key + index, Request("p", "m", tuple(prompt), SamplingParams(temperature=0.0), stop))
    for _ in range(skip):
        core.step()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(steps):
            core.step()
        torch.cuda.synchronize()
    while core.has_work:
        core.step()
    kernels = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    busy, end = 0.0, spans[0][0]
    for start, stop_at in spans:
        busy += max(0.0, stop_at - max(start, end))
        end = max(end, stop_at)
    whole = end - spans[0][0]
    print(f"GPU: {whole / steps / 1e3:.3f} ms a step, idle {100 * (1 - busy / whole):.1f}%")
    print_gaps(kernels, steps)
    by_name: dict[str, tuple[float, int]] = {}
    for event in kernels:
        total, count = by_name.get(event.name, (0.0, 0))
        by_name[event.name] = (total + event.time_range.elapsed_us(), count + 1)
    for name, (total, count) in sorted(by_name.items(), key=lambda item: -item[1][0])[:22]:
        print(f"  {total / steps:9.1f} µs a step {count / steps:7.1f} × {total / count:8.2f} µs  {name[:100]}")


def print_gaps(kernels: list[Any], steps: int) -> None:
    """Between which kernels the GPU waits."""
    gaps: dict[tuple[str, str], tuple[float, int]] = {}
    ordered = sorted(kernels, key=lambda event: event.time_range.start)
    for before, after in pairwise(ordered):
        gap = after.time_range.start - before.time_range.end
        if gap > 0:
            names = (before.name[:40], after.name[:40])
            total, count = gaps.get(names, (0.0, 0))
            gaps[names] = (total + gap, count + 1)
    for names, (total, count) in sorted(gaps.items(), key=lambda item: -item[1][0])[:8]:
        print(f"  waits {total / steps:8.1f} µs a step {count / steps:6.1f} × {total / count:7.2f} µs  {names}")


def prefetch_all(prefetch: int) -> None:
    """Has every tile ask for so much of each row of its weight."""
    found = quire.kernels.linear.tile_for

    def tile_for(*arguments: Any) -> LinearTile | None:
        tile = found(*arguments)
        return None if tile is None else replace(tile, prefetch=prefetch)

    quire.kernels.linear.tile_for = tile_for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--only", default="", help="comma-separated names of workloads (default: all)")
    parser.add_argument("--no-prefix-caching", action="store_true")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=None)
    parser.add_argument("--max-mixed-tokens", type=int, default=None)
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs that share the model")
    parser.add_argument("--cublas", action="store_true", help="also for products of few rows")
    parser.add_argument("--prefetch", type=int, default=None, help="elements of each row of a weight, for all tiles")
    parser.add_argument("--rehearse", action="store_true", help="what is run before a workload is the workload itself")
    parser.add_argument("--no-prepare", action="store_true", help="graphs are captured when a workload wants them")
    parser.add_argument("--trace", action="store_true", help="shows steps of one token a sequence beside their floor")
    parser.add_argument("--profile", default="", help="workload whose steady steps are profiled")
    parser.add_argument("--gaps", action="store_true", help="the GPU's idle time between steps")
    parser.add_argument("--waste", action="store_true", help="slots of granted pages without a token, on mixed1024")
    parser.add_argument(
        "--caching", type=int, default=0, metavar="ROUNDS", help="prefix caching without hits, on and off"
    )
    parser.add_argument("--drafts", type=int, default=0, metavar="K", help="verified of a sequence and step, at most")
    parser.add_argument(
        "--accept", type=float, nargs="+", default=[], metavar="TOKENS",
        help="synthetic acceptance: each workload once for so many tokens a step and sequence on average where K "
        "drafts are verified; 1: all are wrong (default: no drafts)",
    )  # fmt: skip
    parser.add_argument("--head", action="store_true", help="an EAGLE-3 head makes the drafts: else they cost no time")
    parser.add_argument("--skip", type=int, default=40, help="steps before the profile (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where figures go as JSON")
    arguments = parser.parse_args()
    if arguments.accept and arguments.tensor_parallel_size > 1:
        parser.error("--accept is of one GPU's: others would count which drafts are right themselves")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[arguments.model]))
        head = Path(folder) / "head"
        head.mkdir()
        shape = MODELS[arguments.model] | HEAD | {"target_hidden_size": MODELS[arguments.model]["hidden_size"]}
        (head / "config.json").write_text(json.dumps(shape))
        if arguments.cublas:
            GpuLinears.on = classmethod(lambda cls, device, dtype: cls(device, dtype, None))  # type: ignore[method-assign,assignment]
        if arguments.prefetch is not None:
            prefetch_all(arguments.prefetch)
        imported = time.perf_counter()
        loaded = load_core(
            CoreConfig(
                model=folder, device=Device.CUDA, load_format=LoadFormat.DUMMY, max_model_len=4096,
                max_num_seqs=arguments.max_num_seqs, max_num_batched_tokens=arguments.max_num_batched_tokens,
                max_mixed_tokens=arguments.max_mixed_tokens,
                max_waiting=100000, enable_prefix_caching=not arguments.no_prefix_caching,
                speculation=Speculation.AUTO if arguments.drafts else Speculation.OFF,
                num_speculative_tokens=arguments.drafts or 1,
                speculative_model=str(head) if arguments.head else "",
                tensor_parallel_size=arguments.tensor_parallel_size,
            ),
            lambda *_: None,
        )  # fmt: skip
    core, runner = loaded.core, loaded.core._runner
    if isinstance(runner, Leader):
        runner = runner.runner
    if not isinstance(runner, GpuRunner):
        parser.error("there is no GPU")
    told = ToldDrafts(core, runner)
    told.tell(None, arguments.drafts)
    ready = time.perf_counter()
    run(core, fixed(1, 8, 1, 9), 0)
    start = {
        "import": round(imported - BEGAN, 2),
        **{name: round(seconds, 2) for name, seconds in loaded.ready.start_seconds.items()},
        "first token": round(time.perf_counter() - ready, 2), "all": round(time.perf_counter() - BEGAN, 2),
    }  # fmt: skip
    figures: dict[str, object] = {
        "device": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
        "model": arguments.model, "tensor_parallel_size": arguments.tensor_parallel_size,
        "pages": loaded.ready.num_pages, "start_s": start,
    }  # fmt: skip
    began, more = time.perf_counter(), not arguments.no_prepare
    while more:
        more = core.prepare()
    figures["all graphs captured after s more"] = round(time.perf_counter() - began, 2)
    print(json.dumps(figures), flush=True)
    wanted = [name for name in arguments.only.split(",") if name]
    key = 1000
    for workload in WORKLOADS:
        if wanted and workload.name not in wanted:
            continue
        for length in arguments.accept or [None]:
            told.tell(length, arguments.drafts)
            if workload.warm is not None:
                run(core, workload.make() if arguments.rehearse else workload.warm(), key, salt="before")
                key += 10000
            trace: list[Step] | None = [] if arguments.trace else None
            gaps = StepGaps(runner) if arguments.gaps else None
            found = run(core, workload.make(), key, trace, salt=str(length))
            if core.stats.speculation is not None:
                found["drafts"] = drafted(core.stats.speculation)
            if gaps is not None:
                found["idle between steps"] = round(gaps.share(), 5)
            key += 10000
            made = "by a head" if arguments.head else "without a head's time"
            name = workload.name
            if length is not None:
                name += f", {arguments.drafts} drafts {made}, {length:g} a step"
            figures[name] = found
            print(name, json.dumps(found), flush=True)
            if trace:
                print_trace(trace, MODELS[arguments.model])
    for name in [name for name in arguments.profile.split(",") if name]:
        print("profile of", name)
        told.tell(arguments.accept[0] if arguments.accept else None, arguments.drafts)
        work = next(workload for workload in WORKLOADS if workload.name == name).make()
        profile(core, [Job(prompt[::-1], output) for prompt, output in work], key, arguments.skip, 20)
        key += 10000
    if arguments.waste:
        figures["waste"] = round(waste(core, mixed(1024, 4), key), 4)
        print("KV waste on mixed1024", figures["waste"], flush=True)
        key += 10000
    if arguments.caching:
        figures["caching"] = compare_caching(core, key + 1000, arguments.caching)
        print("prefix caching, s", figures["caching"], flush=True)
    core.close()
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
