"""What engines say when they are looked into, and what `quire top` knows of one that said so."""

from __future__ import annotations

from quire.cli.engine_watch import EngineWatch
from quire.v1 import engine_pb2

BOUNDS = (0.01, 0.1, 1.0, 10.0)


def stats_of(
    steps: int = 0, prompt: int = 0, cached: int = 0, output: int = 0, firsts: int = 0, slow: int = 0
) -> engine_pb2.EngineStats:
    """Counts of an engine that drew `firsts` first tokens, and the rest of `output` after them, `slow` ones slowly."""
    gaps = output - firsts
    return engine_pb2.EngineStats(
        steps=steps, prompt_tokens=prompt, cached_prompt_tokens=cached, output_tokens=output,
        computed_tokens=prompt - cached + gaps,
        first_token_seconds=engine_pb2.Histogram(bounds=BOUNDS, counts=[0, firsts, 0, 0, 0]),
        inter_token_seconds=engine_pb2.Histogram(bounds=BOUNDS, counts=[gaps - slow, 0, slow, 0, 0]),
    )  # fmt: skip


def answer_of(
    phase: engine_pb2.EnginePhase.ValueType = engine_pb2.ENGINE_PHASE_READY,
    *,
    name: str = "engine-0",
    epoch: int = 1,
    running: int = 0,
    waiting: int = 0,
    pages: str = "",
    stats: engine_pb2.EngineStats | None = None,
) -> engine_pb2.InspectResponse:
    """What an engine says whose pages are u(sed), s(hared), c(ached) or free."""
    answer = engine_pb2.InspectResponse(stats=stats or stats_of())
    status = answer.status
    status.engine, status.phase, status.epoch, status.model, status.max_num_seqs = name, phase, epoch, "tiny", 8
    status.load.running, status.load.waiting, status.load.pages_total = running, waiting, len(pages)
    answer.pages.pages_per_cell = 1
    answer.pages.used.extend(int(page in "us") for page in pages)
    answer.pages.shared.extend(int(page == "s") for page in pages)
    answer.pages.cached.extend(int(page == "c") for page in pages)
    for index in range(running + waiting):
        answer.sequences.add(
            request_id=f"cmpl-{index:032}", prompt_tokens=1000, output_tokens=10 * index, max_output_tokens=200,
            state=engine_pb2.SEQUENCE_STATE_DECODING if index < running else engine_pb2.SEQUENCE_STATE_WAITING,
            pages=63, age_ms=1234,
        )  # fmt: skip
    return answer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def watch_of(*answers: engine_pb2.InspectResponse, url: str = "") -> EngineWatch:
    """An engine that gave these answers, a second apart."""
    clock = Clock()
    watch = EngineWatch("unix:/e.sock", url, clock)
    for answer in answers:
        clock.now += 1
        watch.take(answer)
    return watch
