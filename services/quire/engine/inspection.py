"""A look into the core at one moment: the pages and the sequences, for `quire top`.

Called by the core process between two steps, when somebody asks and never else: it costs a step nothing. Numbers
only: what is asked and answered does not leave the core this way.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from quire.engine.page_pool import PagePool
from quire.engine.scheduler import Scheduler
from quire.engine.sequence import Sequence, SequenceState


class Activity(Enum):
    """What a sequence is doing; the values are the names of `quire.v1.SequenceState` without their prefix."""

    WAITING = "WAITING"
    PREEMPTED = "PREEMPTED"
    PREFILLING = "PREFILLING"
    DECODING = "DECODING"


@dataclass(frozen=True, slots=True)
class PageMap:
    """Per cell of `pages_per_cell` neighbouring pages: how many are used, shared (and so used, too) and cached."""

    pages_per_cell: int
    used: tuple[int, ...]
    shared: tuple[int, ...]
    cached: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SequenceInfo:
    """One sequence, without its tokens; see `quire.v1.SequenceInfo`."""

    request_id: str
    activity: Activity
    prompt_tokens: int
    output_tokens: int
    max_output_tokens: int
    computed_tokens: int
    pages: int
    age_seconds: float
    preemptions: int
    priority: int
    constrained: bool


@dataclass(frozen=True, slots=True)
class Inspection:
    """`sequences`: the batch in order of arrival, then those that wait in the order in which they will join."""

    pages: PageMap
    sequences: tuple[SequenceInfo, ...]


def inspect_core(scheduler: Scheduler, max_cells: int, max_sequences: int, now: float) -> Inspection:
    """What `scheduler` holds; `now` is on the clock of the sequences' `arrived_at`."""
    ordered = sorted(scheduler, key=_place)[:max_sequences]
    return Inspection(map_pages(scheduler.pool, max_cells), tuple(_info(sequence, now) for sequence in ordered))


def map_pages(pool: PagePool, max_cells: int) -> PageMap:
    """The pool in at most `max_cells` cells."""
    pages_per_cell = -(-pool.num_pages // max_cells)
    references = np.array(pool.all_references, dtype=np.int32)
    cached = np.zeros(pool.num_pages, dtype=bool)
    cached[np.fromiter(pool.cached_pages, dtype=np.int64, count=pool.cached)] = True

    def per_cell(pages: npt.NDArray[np.bool_]) -> tuple[int, ...]:
        starts = np.arange(0, pool.num_pages, pages_per_cell)
        return tuple(np.add.reduceat(pages, starts, dtype=np.int64).tolist())

    return PageMap(pages_per_cell, per_cell(references > 0), per_cell(references > 1), per_cell(cached))


def _place(sequence: Sequence) -> tuple[bool, int, int]:
    if sequence.state is SequenceState.RUNNING:
        return (False, 0, sequence.arrival)
    return (True, *sequence.order)


def _info(sequence: Sequence, now: float) -> SequenceInfo:
    return SequenceInfo(
        request_id=sequence.request.request_id,
        activity=_activity(sequence),
        prompt_tokens=sequence.num_prompt_tokens,
        output_tokens=len(sequence.token_ids) - sequence.num_prompt_tokens,
        max_output_tokens=sequence.max_tokens - sequence.num_prompt_tokens,
        computed_tokens=sequence.num_computed,
        pages=len(sequence.block_table),
        age_seconds=now - sequence.arrived_at,
        preemptions=sequence.num_preemptions,
        priority=sequence.request.priority,
        constrained=sequence.request.constraint is not None,
    )


def _activity(sequence: Sequence) -> Activity:
    if sequence.state is not SequenceState.RUNNING:
        return Activity.PREEMPTED if sequence.num_preemptions else Activity.WAITING
    return Activity.PREFILLING if sequence.num_pending > 1 else Activity.DECODING
