"""What token masks cost the engine's core on a GPU: constrained requests against free ones, over random weights.

    PYTHONPATH=services:kernels:operator python tests/benchmarks/gpu_structured.py llama-8b --out figures.json

The masks are synthetic: for every sequence and step one of 64 bit fields, drawn anew, of which each allows about 2% of
the vocabulary, is copied into the batch by a pool of threads, as the sidecar's workers write theirs. What is measured
is all that the engine does with them: the wait for the last step's tokens, the copy to the GPU beside the forward pass,
the masks in the graph of the draw. --fill-us is how long a row takes to fill besides. Free and constrained requests
take turns in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gpu_engine import MODELS, fixed, measure
from gpu_profile import Profile
from gpu_watch import StepGaps

from quire.engine.config import CoreConfig, Device, LoadFormat
from quire.engine.gpu.runner import GpuRunner
from quire.engine.loading import load_core
from quire.engine.masks import MaskBatch, MaskRequest
from quire.service.request import Constraint, ConstraintKind

THREADS = 4


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
        rows = np.empty((len(sequences), self._rows.shape[1]), np.uint32)

        def fill(worker: int) -> None:
            for index in range(worker, len(sequences), THREADS):
                rows[index] = self._rows[(sequences[index] * 7 + step) % 64]
                if self._fill_s:
                    time.sleep(self._fill_s)

        list(self._workers.map(fill, range(THREADS)))
        return MaskBatch(rows, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fill-us", type=float, default=0.0, help="that a row takes besides (default: none)")
    parser.add_argument("--profile", action="store_true", help="of 20 constrained steps at each number of requests")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    constraint = Constraint(ConstraintKind.JSON_OBJECT)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[args.model]))
        config = CoreConfig(
            model=folder, device=Device.CUDA, load_format=LoadFormat.DUMMY, max_model_len=4096, max_num_seqs=256
        )
        loaded = load_core(
            config,
            lambda *_: None,
            lambda model: SyntheticMasks(model.vocab_size, sorted(model.eos_token_ids), args.fill_us),
        )
    core, runner, seed, figures = loaded.core, loaded.core._runner, 0, {}
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
