"""Who goes first, who gives way, and that nobody waits for ever."""

from __future__ import annotations

from dataclasses import replace

import pytest
from page_machine import VOCAB_SIZE, PageMachine

from quire.engine.core import EngineCore
from quire.engine.page_pool import PagePool
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.service.errors import ErrorCode, OverloadedError
from quire.service.pages import PAGE_SIZE
from quire.service.request import FinishReason, Request, SamplingParams, StopConditions, Update


class Engine:
    """A core over a PageMachine, which counts its steps and keeps what each request got."""

    def __init__(self, num_pages: int = 16, max_num_seqs: int = 4, budget: int = 64, max_waiting: int = 100) -> None:
        max_model_len = num_pages * PAGE_SIZE
        self.pool = PagePool(num_pages)
        config = SchedulerConfig(max_num_seqs, budget, max_model_len, max_waiting)
        self.scheduler = Scheduler(config, self.pool, frozenset())
        self.now = 0.0
        self.core = EngineCore(
            PageMachine(num_pages, max_num_seqs, max_model_len), self.scheduler, None, VOCAB_SIZE, lambda: self.now
        )
        self.num_steps = 0
        self.first_step: dict[int, int] = {}
        self.tokens: dict[int, int] = {}
        self.finished: dict[int, Update] = {}

    def submit(self, key: int, prompt: int, output: int, *, priority: int = 0, deadline_s: float | None = None) -> None:
        """A request whose prompt nobody shares."""
        request = Request(
            str(key), "m", tuple((key * 89 + 7 * i) % VOCAB_SIZE for i in range(prompt)),
            SamplingParams(temperature=0.0), StopConditions(output, ignore_eos=True), priority=priority,
        )  # fmt: skip
        if deadline_s is not None:
            request = replace(request, deadline_unix_ms=int(deadline_s * 1000))
        self.core.submit(key, request)
        self.tokens[key] = 0

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.num_steps += 1
            for update in self.core.step():
                if update.started is not None:
                    self.first_step[update.key] = self.num_steps
                self.tokens[update.key] += len(update.token_ids)
                if update.finished is not None:
                    assert update.key not in self.finished
                    self.finished[update.key] = update

    def run(self, limit: int = 1000) -> None:
        """Until nothing is left to do."""
        for _ in range(limit):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")


def test_a_long_prompt_is_not_starved_by_short_ones() -> None:
    """With a full cache there is always room for one more short request: the long one would never start."""
    engine = Engine(num_pages=16, max_num_seqs=4)
    for key in range(4):
        engine.submit(key, prompt=40, output=20)
    engine.step()
    engine.submit(1000, prompt=200, output=4)
    key = 4
    while 1000 not in engine.finished and engine.num_steps < 300:
        if engine.scheduler.num_waiting < 8:
            engine.submit(key, prompt=40, output=20)
            key += 1
        engine.step()
    assert engine.first_step[1000] <= 40 and 1000 in engine.finished
    later = [number for number in engine.first_step if 4 <= number < 1000]
    assert all(engine.first_step[number] >= engine.first_step[1000] for number in later)
    engine.run()
    assert len(engine.finished) == key + 1


def test_every_full_cache_makes_progress() -> None:
    """Requests that outgrow the cache together must not preempt one another for ever."""
    engine = Engine(num_pages=16, max_num_seqs=4)
    for key in range(12):
        engine.submit(key, prompt=30, output=200)
    engine.run(limit=12 * 200 + 500)
    assert all(engine.finished[key].finished.reason is FinishReason.LENGTH for key in range(12))  # type: ignore[union-attr]
    assert engine.scheduler.num_preemptions > 0 and engine.pool.available == 16


def test_a_long_prompt_does_not_stall_those_who_decode() -> None:
    """Chunks share the step with decodes: each of them gets a token in every step."""
    engine = Engine(num_pages=64, max_num_seqs=4, budget=32)
    engine.submit(0, prompt=10, output=100)
    engine.submit(1, prompt=10, output=100)
    engine.step()
    engine.submit(2, prompt=600, output=1)
    before, began = dict(engine.tokens), engine.num_steps
    while 2 not in engine.finished:
        engine.step()
    steps = engine.num_steps - began
    assert steps >= 600 // 30 and [engine.tokens[key] - before[key] for key in (0, 1)] == [steps, steps]


def test_what_loses_least_gives_way() -> None:
    """A request with much work done must not be computed again for one that has little."""
    engine = Engine(num_pages=10, max_num_seqs=3)
    engine.submit(0, prompt=16, output=60)
    engine.submit(1, prompt=100, output=60)
    engine.step(3)
    while not engine.scheduler.num_preemptions:
        engine.step()
    small, large = engine.scheduler.get(0), engine.scheduler.get(1)
    assert small is not None and large is not None
    assert (small.num_preemptions, large.num_preemptions) == (1, 0)
    engine.run()
    assert engine.tokens == {0: 60, 1: 60}


def test_lower_priorities_give_way_and_wait() -> None:
    """An urgent request must not wait for those who have time, not even when they have more work to lose."""
    engine = Engine(num_pages=10, max_num_seqs=3)
    engine.submit(0, prompt=100, output=60, priority=-1)
    engine.submit(1, prompt=16, output=60, priority=1)
    engine.submit(2, prompt=16, output=2, priority=-2)
    engine.submit(3, prompt=16, output=2)
    engine.run()
    assert engine.first_step[1] <= engine.first_step[3] <= engine.first_step[0] <= engine.first_step[2]
    assert engine.tokens == {0: 60, 1: 60, 2: 2, 3: 2}
    assert list(engine.finished)[:2] == [3, 1]


def test_cancelled_within_a_step() -> None:
    """A client that is gone must not hold pages that others wait for."""
    engine = Engine(num_pages=8, max_num_seqs=2)
    engine.submit(0, prompt=100, output=20)
    engine.submit(1, prompt=100, output=20)
    engine.step(2)
    assert engine.scheduler.num_waiting == 1
    engine.core.cancel(0)
    engine.step()
    assert engine.finished[0].finished.reason is FinishReason.CANCELLED  # type: ignore[union-attr]
    assert 1 in engine.first_step
    engine.core.cancel(0)
    engine.run()
    assert engine.tokens[1] == 20


@pytest.mark.parametrize("waiting", [False, True])
def test_a_deadline_ends_a_request(waiting: bool) -> None:
    """Whoever gave up at a deadline must not be computed for after it, waiting or running."""
    engine = Engine(num_pages=8, max_num_seqs=2)
    if waiting:
        engine.submit(0, prompt=100, output=20)
    engine.submit(1, prompt=100, output=20, deadline_s=5.0)
    engine.now = 4.9
    engine.step(3)
    assert 1 not in engine.finished and (1 in engine.first_step) is not waiting
    engine.now = 5.0
    engine.step()
    finished = engine.finished[1].finished
    assert finished is not None and finished.error is not None
    assert finished.error.code is ErrorCode.DEADLINE_EXCEEDED and finished.error.field == "deadline_unix_ms"
    engine.run()
    assert engine.pool.available == 8


def test_the_queue_has_an_end() -> None:
    """Beyond it a client hears at once that it must come back later, and nothing of it is kept."""
    engine = Engine(max_num_seqs=1, max_waiting=3)
    engine.submit(0, prompt=10, output=5)
    engine.step()
    for key in range(1, 4):
        engine.submit(key, prompt=10, output=5)
    with pytest.raises(OverloadedError, match="3 requests are waiting already: try again later"):
        engine.submit(4, prompt=10, output=5)
    engine.core.cancel(2)
    engine.submit(5, prompt=10, output=5)
    engine.run()
    assert sorted(engine.finished) == [0, 1, 2, 3, 5]


def test_what_the_engine_tells_of_itself() -> None:
    """Operators find what is slow by these numbers: each token must be counted once and where it belongs."""
    engine = Engine(num_pages=32, max_num_seqs=2, budget=16)
    engine.submit(0, prompt=40, output=5)
    engine.submit(1, prompt=10, output=3)
    engine.submit(2, prompt=10, output=1)
    engine.run()
    stats = engine.core.stats
    assert stats.output_tokens == 9 and stats.prompt_tokens == 60
    assert stats.computed_tokens == 60 + 4 + 2 == stats.step_tokens.sum
    assert stats.queue_seconds.count == stats.first_token_seconds.count == 3
    assert stats.inter_token_seconds.count == 6
    assert stats.step_seconds.count == stats.steps == engine.num_steps
    # Whoever waits longer has waited longer.
    assert stats.first_token_seconds.sum > stats.queue_seconds.sum > 0
