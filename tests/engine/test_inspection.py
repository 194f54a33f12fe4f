"""What a look into the core shows, in every state that pages and sequences can be in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from page_machine import VOCAB_SIZE, PageMachine

from quire.engine.core import EngineCore
from quire.engine.inspection import Activity, Inspection, inspect_core, map_pages
from quire.engine.page_pool import PagePool
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.service.pages import PAGE_SIZE
from quire.service.request import Request, SamplingParams, StopConditions

NUM_PAGES = 12


class Engine:
    def __init__(self) -> None:
        max_model_len = NUM_PAGES * PAGE_SIZE
        self.scheduler = Scheduler(SchedulerConfig(3, 64, max_model_len), PagePool(NUM_PAGES), frozenset())
        runner = PageMachine(NUM_PAGES, 3, max_model_len)
        self.core = EngineCore(runner, self.scheduler, None, VOCAB_SIZE)

    def submit(self, key: int, prompt: int, output: int, priority: int = 0) -> None:
        tokens = tuple((key * 89 + 7 * i) % VOCAB_SIZE for i in range(prompt))
        stop = StopConditions(output, ignore_eos=True)
        self.core.submit(key, Request(f"r{key}", "m", tokens, SamplingParams(temperature=0.0), stop, priority=priority))

    def look(self, max_sequences: int = 100) -> Inspection:
        """At a moment that is 5 seconds after every arrival."""
        for sequence in self.scheduler:
            sequence.arrived_at = 10.0
        return inspect_core(self.scheduler, NUM_PAGES, max_sequences, now=15.0)


def activities(inspection: Inspection) -> dict[str, Activity]:
    return {sequence.request_id: sequence.activity for sequence in inspection.sequences}


def test_sequences_in_every_state() -> None:
    """Someone looks because something waits: what waits, and for what, must be shown as it is."""
    engine = Engine()
    engine.submit(1, prompt=100, output=50)
    engine.core.step()
    seen = engine.look()
    (first,) = seen.sequences
    assert (first.activity, first.computed_tokens, first.output_tokens, first.pages) == (Activity.PREFILLING, 64, 0, 4)
    assert (first.prompt_tokens, first.max_output_tokens, first.age_seconds) == (100, 50, 5.0)
    assert sum(seen.pages.used) == 4 and not any(seen.pages.cached)
    engine.core.step()
    engine.submit(2, prompt=40, output=60)
    engine.submit(3, prompt=100, output=20)
    engine.submit(4, prompt=10, output=20, priority=5)
    engine.core.step()
    # The one of the highest priority goes first, and the third is too large for what is left.
    assert activities(engine.look()) == {
        "r1": Activity.DECODING, "r2": Activity.DECODING, "r4": Activity.DECODING, "r3": Activity.WAITING,
    }  # fmt: skip
    assert [sequence.request_id for sequence in engine.look(2).sequences] == ["r1", "r2"]
    while not engine.scheduler.num_preemptions:
        engine.core.step()
    seen = engine.look()
    preempted = [sequence for sequence in seen.sequences if sequence.activity is Activity.PREEMPTED]
    assert [(sequence.preemptions, sequence.pages, sequence.computed_tokens) for sequence in preempted] == [(1, 0, 0)]
    assert sum(seen.pages.used) == sum(sequence.pages for sequence in seen.sequences)
    while engine.core.has_work:
        engine.core.step()
    assert not engine.look().sequences and not any(engine.look().pages.used)
    assert sum(engine.look().pages.cached) == engine.scheduler.pool.cached > 0


@given(st.lists(st.sampled_from(["free", "used", "shared", "cached"]), min_size=1, max_size=200), st.integers(1, 250))
def test_a_page_map_counts_every_page_once(states: list[str], max_cells: int) -> None:
    """A map that is coarser must not show more or fewer pages than there are, nor have more cells than asked for."""
    pool = PagePool(len(states))
    pages = pool.allocate(len(states))
    for page, state in zip(pages, states, strict=True):
        if state == "shared":
            pool.share([page])
        elif state == "cached":
            pool.publish(page, page.to_bytes(16, "little"))
        if state in ("cached", "free"):
            pool.release([page])
    page_map = map_pages(pool, max_cells)
    size = page_map.pages_per_cell
    assert len(page_map.used) == -(-len(states) // size) <= max_cells
    for index in range(len(page_map.used)):
        cell = states[index * size : (index + 1) * size]
        shown = (page_map.used[index], page_map.shared[index], page_map.cached[index])
        assert shown == (
            len(cell) - cell.count("free") - cell.count("cached"),
            cell.count("shared"),
            cell.count("cached"),
        )
