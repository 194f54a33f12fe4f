"""What token masks cost the engine's core on a GPU: constrained requests against free ones, over random weights.

    PYTHONPATH=services:kernels:operator:protos/generated:tests/support \\
        python tests/benchmarks/gpu_structured.py llama-8b --masks sidecar --out figures.json

Synthetic masks are for every sequence and step one of 64 bit fields, drawn anew, of which each allows about 2% of the
vocabulary; it is copied into the batch by a pool of threads, as the sidecar's workers write theirs. What is measured is
all that the engine does with them: the wait for the last step's tokens, the copy to the GPU beside the forward pass,
the masks in the graph of the draw. --fill-us is how long a row takes to fill besides.

Real ones are of a JSON schema without an end, over the embedded model's vocabulary, grown to the model's size: filled
in this process, as the offline API does, or by a sidecar process. Then one more run of each number of requests, which
does not count, tells what a step's masks take, from when they are asked for, and how long the core waits for them.

Free and constrained requests take turns in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import numpy as np
import torch
from gpu_engine import MODELS, fixed, measure
from gpu_profile import Profile
from gpu_watch import StepGaps
from masks import grown
from sidecar_process import SidecarProcess

from quire.cli.bench.structured import _ENDLESS
from quire.engine.config import CoreConfig, Device, LoadFormat
from quire.engine.core import EngineCore
from quire.engine.gpu.runner import GpuRunner
from quire.engine.loading import load_core
from quire.engine.masks import MaskBatch, MaskRequest, MaskSource, MaskTicket
from quire.engine.models.config import ModelConfig
from quire.engine.sidecar_masks import SidecarMasks
from quire.llm.grammar_masks import GrammarMasks
from quire.service.checkpoint import load_text, locate
from quire.service.request import Constraint, ConstraintKind

MAX_REQUESTS = 256
THREADS = 4
ENDLESS = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(_ENDLESS))


@dataclass(frozen=True)
class Ticket:
    batch: Future[MaskBatch]

    def arrives(self, seconds: float) -> bool:
        return True

    def wait(self) -> MaskBatch:
        return self.batch.result()


class SyntheticMasks:
    """See quire.engine.masks.MaskSource."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int], fill_us: float) -> None:
        draw = np.random.default_rng(0)
        words = -(-vocab_size // 32)
        self._rows = np.zeros((64, words), np.uint32)
        for _ in range(5):
            bits = draw.integers(0, 32, (64, words), dtype=np.uint32)
            self._rows |= np.where(draw.random((64, words)) < 0.13, np.uint32(1) << bits, 0).astype(np.uint32)
        for token in eos_token_ids:  # so that every request has its length
            self._rows[:, token // 32] &= ~np.uint32(1 << token % 32)
        self._fill_s = fill_us * 1e-6
        # As a sidecar's file has them: what one step reads, the next does not write.
        self._memory = [np.zeros((MAX_REQUESTS, words), np.uint32) for _ in range(2)]
        self._step = 0
        self._workers = ThreadPoolExecutor(THREADS)
        self._collector = ThreadPoolExecutor(1)

    def begin(self, requests: Sequence[MaskRequest], released: Sequence[int]) -> Ticket:
        self._step += 1
        return Ticket(self._collector.submit(self._fill, [request.sequence for request in requests], self._step))

    def close(self) -> None:
        self._collector.shutdown()
        self._workers.shutdown()

    def _fill(self, sequences: list[int], step: int) -> MaskBatch:
        rows = self._memory[step % 2][: len(sequences)]

        def fill(worker: int) -> None:
            for index in range(worker, len(sequences), THREADS):
                rows[index] = self._rows[(sequences[index] * 7 + step) % 64]
                if self._fill_s:
                    time.sleep(self._fill_s)

        list(self._workers.map(fill, range(THREADS)))
        return MaskBatch(rows, {})


@dataclass
class WatchedTicket:
    """`waited` is for how many seconds the core waited for it, `took` for how many from when it was asked for."""

    ticket: MaskTicket
    began: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    took: float = 0.0

    def arrives(self, seconds: float) -> bool:
        began = time.perf_counter()
        arrived = self.ticket.arrives(seconds)
        self.waited += time.perf_counter() - began
        return arrived

    def wait(self) -> MaskBatch:
        began = time.perf_counter()
        batch = self.ticket.wait()
        self.waited += time.perf_counter() - began
        return batch


class WatchedMasks:
    """A MaskSource's times, while it is watched: that takes time of its own."""

    def __init__(self, source: MaskSource) -> None:
        self.tickets: list[WatchedTicket] = []
        self.watch = False
        self._source = source
        # Who asks the core's ticket would hear when the core looks, which is later.
        self._asked: SimpleQueue[WatchedTicket] = SimpleQueue()
        Thread(target=self._note, daemon=True).start()

    def begin(self, requests: Sequence[MaskRequest], released: Sequence[int]) -> MaskTicket:
        if not (self.watch and requests):
            return self._source.begin(requests, released)
        began = time.perf_counter()
        watched = WatchedTicket(self._source.begin(requests, released), began)
        self.tickets.append(watched)
        self._asked.put(watched)
        return watched

    def close(self) -> None:
        self._source.close()

    def times(self) -> dict[str, float]:
        """Of the steps that were watched, in milliseconds."""
        found = {}
        for name in ("took", "waited"):
            values = sorted(1e3 * getattr(ticket, name) for ticket in self.tickets)
            for share in (50, 99):
                found[f"{name} p{share} ms"] = round(values[len(values) * share // 100], 2)
        self.tickets = []
        return found

    def _note(self) -> None:
        while True:
            watched = self._asked.get()
            watched.ticket.wait()
            watched.took = time.perf_counter() - watched.began


def real_masks(kind: str, folder: Path, running: ExitStack) -> Callable[[ModelConfig], MaskSource]:
    """Those of ENDLESS, which is compiled already, for the tokenizer in `folder`."""
    if kind == "offline":
        masks = GrammarMasks(load_text(locate(str(folder))))
        masks.compile(ENDLESS)
        return lambda model: masks
    sidecar = running.enter_context(SidecarProcess(folder, "--model", str(folder)))
    sidecar.wait_until_serving()
    sidecar.compile(ENDLESS)
    return lambda model: SidecarMasks(sidecar.address, model.vocab_size, MAX_REQUESTS, deadline_s=5.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--masks", choices=("synthetic", "offline", "sidecar"), default="synthetic")
    parser.add_argument(
        "--tokenizer", default="", metavar="FOLDER", help="that is grown for real masks (default: the embedded model's)"
    )
    parser.add_argument("--fill-us", type=float, default=0.0, help="that a synthetic row takes besides (default: none)")
    parser.add_argument("--profile", action="store_true", help="of 20 constrained steps at each number of requests")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with ExitStack() as running:
        measure_all(args, running)


def load(args: argparse.Namespace, running: ExitStack) -> tuple[EngineCore, WatchedMasks]:
    folder, shape = Path(running.enter_context(tempfile.TemporaryDirectory())), MODELS[args.model]
    if args.masks == "synthetic":

        def make_masks(model: ModelConfig) -> MaskSource:
            return SyntheticMasks(model.vocab_size, sorted(model.eos_token_ids), args.fill_us)

    else:
        text = load_text(locate(args.tokenizer))
        grown(text, folder, shape["vocab_size"])
        # The model ends where the tokenizer does.
        shape = shape | {"eos_token_id": text.eos_token_ids[0]}
    (folder / "config.json").write_text(json.dumps(shape))
    if args.masks != "synthetic":
        make_masks = real_masks(args.masks, folder, running)
    watched: list[WatchedMasks] = []

    def watch(model: ModelConfig) -> MaskSource:
        watched.append(WatchedMasks(make_masks(model)))
        return watched[0]

    config = CoreConfig(
        model=str(folder), device=Device.CUDA, load_format=LoadFormat.DUMMY, max_model_len=4096,
        max_num_seqs=MAX_REQUESTS,
    )  # fmt: skip
    return load_core(config, lambda *_: None, watch).core, watched[0]


def measure_all(args: argparse.Namespace, running: ExitStack) -> None:
    constraint = Constraint(ConstraintKind.JSON_OBJECT) if args.masks == "synthetic" else ENDLESS
    core, masks = load(args, running)
    runner, seed, figures = core._runner, 0, {}
    assert isinstance(runner, GpuRunner)
    for count in args.requests:
        seconds: dict[bool, list[float]] = {False: [], True: []}
        idle: dict[bool, float] = {}
        busy: dict[bool, float] = {}
        for turn in range(2 + 2 * args.rounds):
            masked = turn % 4 in (1, 2)
            gaps = StepGaps(runner)
            found = measure(core, fixed(count, 128, 256, seed), constraint=constraint if masked else None)
            idle[masked], busy[masked] = round(gaps.share(), 5), found["host_busy"]
            seed += count
            if turn > 1:  # the first two capture graphs
                seconds[masked].append(found["s"])
        free, constrained = (statistics.median(seconds[masked]) for masked in (False, True))
        figures[count] = {
            "free_s": seconds[False], "constrained_s": seconds[True], "cost": round(constrained / free - 1, 4),
            "idle between steps, free and constrained": [idle[False], idle[True]],
            "host_busy": [busy[False], busy[True]],
        }  # fmt: skip
        masks.watch = True
        measure(core, fixed(count, 128, 256, seed), constraint=constraint)
        masks.watch, seed = False, seed + count
        figures[count]["masks"] = masks.times()
        print(count, json.dumps(figures[count]), flush=True)
        if args.profile:
            measure(core, fixed(count, 128, 256, seed), constraint=constraint, each_step=Profile(40, 20))
            seed += count
    core.close()
    print(torch.cuda.get_device_name())
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
