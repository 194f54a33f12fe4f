"""What an engine tells of itself, into the contract."""

from __future__ import annotations

from collections.abc import Iterator

from quire.engine.inspection import PageMap, SequenceInfo
from quire.engine.messages import Load
from quire.engine.speculation.stats import SpeculationStats
from quire.engine.stats import Histogram
from quire.v1 import engine_pb2


def stats_to_proto(load: Load) -> engine_pb2.EngineStats:
    """Counts and distributions."""
    stats = load.stats
    return engine_pb2.EngineStats(
        steps=stats.steps,
        prompt_tokens=stats.prompt_tokens,
        cached_prompt_tokens=stats.cached_prompt_tokens,
        computed_tokens=stats.computed_tokens,
        output_tokens=stats.output_tokens,
        preemptions=load.preemptions,
        step_seconds=_histogram(stats.step_seconds),
        step_tokens=_histogram(stats.step_tokens),
        queue_seconds=_histogram(stats.queue_seconds),
        first_token_seconds=_histogram(stats.first_token_seconds),
        inter_token_seconds=_histogram(stats.inter_token_seconds),
        drafters=_drafters(stats.speculation) if stats.speculation is not None else (),
        verified_at=stats.speculation.verified_at if stats.speculation is not None else (),
        accepted_at=stats.speculation.accepted_at if stats.speculation is not None else (),
    )


def page_map_to_proto(pages: PageMap) -> engine_pb2.PageMap:
    """The pages, cell by cell."""
    return engine_pb2.PageMap(
        pages_per_cell=pages.pages_per_cell, used=pages.used, shared=pages.shared, cached=pages.cached
    )


def sequence_to_proto(sequence: SequenceInfo) -> engine_pb2.SequenceInfo:
    """One sequence's numbers."""
    return engine_pb2.SequenceInfo(
        request_id=sequence.request_id,
        state=engine_pb2.SequenceState.Value(f"SEQUENCE_STATE_{sequence.activity.value}"),
        prompt_tokens=sequence.prompt_tokens,
        output_tokens=sequence.output_tokens,
        max_output_tokens=sequence.max_output_tokens,
        computed_tokens=sequence.computed_tokens,
        pages=sequence.pages,
        age_ms=round(sequence.age_seconds * 1000),
        preemptions=sequence.preemptions,
        priority=sequence.priority,
        constrained=sequence.constrained,
    )


def _drafters(stats: SpeculationStats) -> Iterator[engine_pb2.DrafterStats]:
    for name, drafted in stats.drafted.items():
        if drafted:
            yield engine_pb2.DrafterStats(
                name=name,
                drafted_tokens=drafted,
                verified_tokens=stats.verified[name],
                accepted_tokens=stats.accepted[name],
            )


def _histogram(histogram: Histogram) -> engine_pb2.Histogram:
    return engine_pb2.Histogram(bounds=histogram.bounds, counts=histogram.counts, sum=histogram.sum)
