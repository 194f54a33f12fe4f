"""The CPU engine on the embedded model, beside llama.cpp and transformers on the same file, in turn.

    python tests/benchmarks/cpu_speed.py
    python tests/benchmarks/cpu_speed.py --llama-cpp ~/llama.cpp/build/bin --rounds 5
    python tests/benchmarks/cpu_speed.py --transformers

llama.cpp's `llama-bench` and `llama-batched-bench` can be built from the source package of llama-cpp-python:
`cmake -B build -DGGML_NATIVE=ON -DLLAMA_CURL=OFF`, then `cmake --build build --target llama-bench llama-batched-bench`.
The machine's speed changes from minute to minute: engines take turns, and each round's ratio is what counts.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from quire.engine.config import CoreConfig
from quire.engine.core import EngineCore
from quire.engine.loading import load_core
from quire.service.checkpoint.locate import locate
from quire.service.request import Request, SamplingParams, StopConditions

PROMPT_TOKENS = 512
BATCH = 32
BATCH_PROMPT_TOKENS = 128
DECODE_STEPS = 128

PREFILL = f"prefill, {PROMPT_TOKENS} tokens"
BATCHED = f"decode, {BATCH} sequences"
SINGLE = "decode, one sequence"


@dataclass(frozen=True, slots=True)
class Engine:
    """Quire's core in this process; every prompt is new, so that none is in the prefix cache."""

    core: EngineCore
    random: random.Random

    def prefill(self) -> float:
        """Tokens per second of one prompt."""
        began = time.perf_counter()
        self._run(1, PROMPT_TOKENS, steps=0)
        return PROMPT_TOKENS / (time.perf_counter() - began)

    def decode(self, num_sequences: int) -> float:
        """Tokens per second of all sequences together while all of them decode."""
        seconds = self._run(num_sequences, BATCH_PROMPT_TOKENS, steps=DECODE_STEPS)
        return num_sequences * DECODE_STEPS / seconds

    def _run(self, num_sequences: int, num_prompt_tokens: int, steps: int) -> float:
        for key in range(num_sequences):
            self.core.submit(key, self._request(key, num_prompt_tokens))
        started: set[int] = set()
        while len(started) < num_sequences:
            started.update(update.key for update in self.core.step() if update.token_ids)
        began = time.perf_counter()
        for _ in range(steps):
            self.core.step()
        seconds = time.perf_counter() - began
        for key in range(num_sequences):
            self.core.cancel(key)
        while self.core.has_work:
            self.core.step()
        return seconds

    def _request(self, key: int, num_prompt_tokens: int) -> Request:
        prompt = tuple(self.random.randrange(100, 49_000) for _ in range(num_prompt_tokens))
        stop = StopConditions(max_tokens=4096, ignore_eos=True)
        return Request(str(key), "", prompt, SamplingParams(temperature=0.0), stop)


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """llama.cpp's own benchmarks, once each."""

    folder: Path
    model: str
    threads: int

    def prefill(self) -> float:
        return self._bench("-p", str(PROMPT_TOKENS), "-n", "0")

    def decode(self, num_sequences: int) -> float:
        if num_sequences == 1:
            return self._bench("-p", "0", "-n", str(DECODE_STEPS))
        sizes = ("-npp", str(BATCH_PROMPT_TOKENS), "-ntg", str(DECODE_STEPS), "-npl", str(num_sequences))
        context = str(num_sequences * (BATCH_PROMPT_TOKENS + DECODE_STEPS + 32))
        lines = self._run("llama-batched-bench", "-c", context, *sizes, "--output-format", "jsonl").splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return float(found[-1]["speed_tg"])

    def _bench(self, *sizes: str) -> float:
        (found,) = json.loads(self._run("llama-bench", *sizes, "-r", "1", "-o", "json"))
        return float(found["avg_ts"])

    def _run(self, program: str, *arguments: str) -> str:
        command = [str(self.folder / program), "-m", self.model, "-t", str(self.threads), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True, slots=True)
class Transformers:
    """`generate` in float32."""

    model: torch.nn.Module

    @classmethod
    def load(cls, path: Path) -> Transformers:
        from transformers import AutoModelForCausalLM

        return cls(AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval())

    def decode(self, num_sequences: int) -> float:
        prompt = torch.randint(100, 49_000, (num_sequences, BATCH_PROMPT_TOKENS))
        seconds = []
        for new in (1, 1 + DECODE_STEPS // 4):
            began = time.perf_counter()
            self.model.generate(  # type: ignore[operator]
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
                pad_token_id=0,
            )
            seconds.append(time.perf_counter() - began)
        return num_sequences * (DECODE_STEPS // 4) / (seconds[1] - seconds[0])


def measure(engine: Engine, peers: dict[str, LlamaCpp | Transformers], rounds: int) -> Iterator[tuple[str, str, float]]:
    """(work, engine, tokens per second), the engines in turn for each work and round."""
    for _ in range(rounds):
        for work, sequences in ((PREFILL, 0), (BATCHED, BATCH), (SINGLE, 1)):
            yield work, "quire", engine.decode(sequences) if sequences else engine.prefill()
            for name, peer in peers.items():
                if isinstance(peer, LlamaCpp):
                    yield work, name, peer.decode(sequences) if sequences else peer.prefill()
                elif sequences == 1:
                    yield work, name, peer.decode(sequences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="with llama-bench and llama-batched-bench")
    parser.add_argument("--transformers", action="store_true", help="measure its generate() too, one sequence")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    arguments = parser.parse_args()
    path = locate("").path
    loaded = load_core(CoreConfig(threads=arguments.threads, max_num_seqs=BATCH), lambda progress, activity: None)
    engine = Engine(loaded.core, random.Random(0))
    peers: dict[str, LlamaCpp | Transformers] = {}
    if arguments.llama_cpp:
        peers["llama.cpp"] = LlamaCpp(arguments.llama_cpp, str(path), arguments.threads)
    if arguments.transformers:
        peers["transformers"] = Transformers.load(path)
    engine.prefill()
    speeds: dict[tuple[str, str], list[float]] = {}
    num_measurements = arguments.rounds * (3 + 3 * bool(arguments.llama_cpp) + arguments.transformers)
    # Drawn between two measurements, not by a thread beside them.
    with Progress(auto_refresh=False) as progress:
        task = progress.add_task("measuring", total=num_measurements)
        for work, name, speed in measure(engine, peers, arguments.rounds):
            speeds.setdefault((work, name), []).append(speed)
            progress.advance(task)
            progress.refresh()
    print(f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), {arguments.threads} threads")
    show(speeds, ["quire", *peers])


def show(speeds: dict[tuple[str, str], list[float]], names: list[str]) -> None:
    """A table of medians; ratios are of the same round."""
    table = Table()
    table.add_column("tokens/s, median")
    for name in names:
        table.add_column(name, justify="right")
        if name != "quire":
            table.add_column(f"quire / {name}", justify="right")
    for work in (PREFILL, BATCHED, SINGLE):
        row = [work]
        for name in names:
            found = speeds.get((work, name), [])
            row.append(f"{statistics.median(found):.0f}" if found else "")
            if name != "quire":
                ratios = [ours / theirs for ours, theirs in zip(speeds[work, "quire"], found, strict=bool(found))]
                row.append(f"{statistics.median(ratios):.2f}" if ratios else "")
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
