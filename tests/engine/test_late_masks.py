"""Masks that do not come: sequences without a constraint go on, the others where they were, or end with an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from drafting_machine import DraftingMachine
from hypothesis import given, settings
from hypothesis import strategies as st
from page_machine import EOS, VOCAB_SIZE, Grammar, PageMachine, run_alone

from quire.engine.core import EngineCore
from quire.engine.masks import MaskBatch, MaskRequest
from quire.engine.page_pool import PagePool
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.service.errors import UnavailableError
from quire.service.pages import PAGE_SIZE
from quire.service.request import (
    Constraint,
    ConstraintKind,
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    StopConditions,
)

JSON = Constraint(ConstraintKind.JSON_OBJECT)
NUM_PAGES = 16
MAX_MODEL_LEN = NUM_PAGES * PAGE_SIZE


@dataclass
class LateTicket:
    batch: MaskBatch
    asked_in_vain: int

    def arrives(self, seconds: float) -> bool:
        self.asked_in_vain -= 1
        return self.asked_in_vain < 0

    def wait(self) -> MaskBatch:
        assert self.asked_in_vain < 0, "the core waits for masks that are not there"
        return self.batch


@dataclass
class LateMasks:
    """Grammars whose n-th answer is late by `delays[n]` questions; after those, by none. -1: it is an error by then."""

    delays: list[int]
    grammar: Grammar = field(default_factory=lambda: Grammar({}))
    unanswered: LateTicket | None = None

    def begin(self, requests: Sequence[MaskRequest], released: Sequence[int]) -> LateTicket:
        batch = self.grammar.begin(requests, released).batch
        if not requests:
            return LateTicket(batch, -1)
        assert self.unanswered is None or self.unanswered.asked_in_vain < 0, "asked again before the last answer"
        delay = self.delays.pop() if self.delays else 0
        if delay < 0:
            lost = UnavailableError("the sidecar does not come back")
            batch = MaskBatch(batch.rows, {request.sequence: lost for request in requests})
        self.unanswered = LateTicket(batch, abs(delay))
        return self.unanswered

    def close(self) -> None:
        """Holds nothing."""


class Engine:
    """A core over a PageMachine, with or without a drafter in the pages, and what each request got."""

    def __init__(self, masks: LateMasks, *, run_ahead: bool, num_pages: int = NUM_PAGES, drafter: bool = False) -> None:
        config = SchedulerConfig(4, 64, MAX_MODEL_LEN, drafter_in_pages=drafter)
        scheduler = Scheduler(config, PagePool(num_pages), frozenset({EOS}))
        machine = (DraftingMachine if drafter else PageMachine)(num_pages, 4, MAX_MODEL_LEN)
        self.core = EngineCore(machine, scheduler, masks, VOCAB_SIZE, run_ahead=run_ahead)
        self.requests: dict[int, Request] = {}
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, Finished] = {}

    def submit(self, key: int, prompt: int, constraint: Constraint | None, max_tokens: int = 40) -> None:
        tokens = tuple((key * 89 + 7 * i) % VOCAB_SIZE for i in range(prompt))
        stop = StopConditions(max_tokens, ignore_eos=constraint is None)
        request = Request(str(key), "m", tokens, SamplingParams(temperature=0.0), stop, constraint=constraint)
        self.core.submit(key, request)
        self.requests[key], self.tokens[key] = request, []

    def step(self) -> None:
        for update in self.core.step():
            self.tokens[update.key] += update.token_ids
            if update.finished is not None:
                assert update.key not in self.finished
                self.finished[update.key] = update.finished

    def run(self) -> None:
        for _ in range(3000):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")


@pytest.mark.parametrize("run_ahead", [False, True])
def test_the_others_go_on_meanwhile(run_ahead: bool) -> None:
    """A sidecar that dies would stop requests that never needed it."""
    engine = Engine(LateMasks([60, 0, 0]), run_ahead=run_ahead)
    engine.submit(1, 20, None)
    engine.submit(2, 20, JSON)
    for _ in range(4):
        engine.step()
    held = len(engine.tokens[2])
    for _ in range(30):
        before = len(engine.tokens[1])
        engine.step()
        assert len(engine.tokens[1]) == before + 1
    assert len(engine.tokens[2]) == held
    # New ones, too: those without a constraint start, those with one wait.
    engine.submit(3, 20, JSON, max_tokens=3)
    engine.submit(4, 20, None, max_tokens=3)
    for _ in range(5):
        engine.step()
    assert len(engine.tokens[4]) == 3
    assert not engine.tokens[3]
    engine.run()
    assert engine.finished[3].error is None


@settings(deadline=None, max_examples=80)
@given(
    delays=st.lists(st.integers(0, 6), max_size=40),
    prompts=st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=8),
    run_ahead=st.booleans(),
    drafter=st.booleans(),
    cancelled=st.sets(st.integers(0, 7), max_size=2),
)
def test_late_masks_change_no_output(
    delays: list[int], prompts: list[tuple[int, bool]], run_ahead: bool, drafter: bool, cancelled: set[int]
) -> None:
    """After the sidecar was away, outputs would miss a token, have one twice, or break their grammar; a drafter in the
    pages would miss one."""
    engine = Engine(LateMasks(delays), run_ahead=run_ahead, drafter=drafter)
    for key, (prompt, constrained) in enumerate(prompts):
        engine.submit(key, prompt, JSON if constrained else None)
    for _ in range(7):
        engine.step()
    for key in cancelled & engine.requests.keys():
        engine.core.cancel(key)
    engine.run()
    for key, request in engine.requests.items():
        tokens, is_broken = run_alone(request, MAX_MODEL_LEN)
        if engine.finished[key].reason is FinishReason.CANCELLED:
            assert tokens[: len(engine.tokens[key])] == engine.tokens[key]
        else:
            assert engine.tokens[key] == tokens
            assert (engine.finished[key].error is not None) == is_broken
    pool = engine.core.scheduler.pool
    assert pool.available == pool.num_pages
    # Even if all that were held are gone, the next is served.
    engine.submit(100, 10, JSON, max_tokens=2)
    engine.run()
    assert engine.tokens[100] == run_alone(engine.requests[100], MAX_MODEL_LEN)[0]


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_sidecar_that_never_comes_back_ends_those_that_waited_for_it(run_ahead: bool) -> None:
    """They would hold their pages and their clients for ever; or others would end with them."""
    engine = Engine(LateMasks([-20, 0, 0]), run_ahead=run_ahead)
    engine.submit(1, 20, None)
    engine.submit(2, 20, JSON)
    engine.run()
    error = engine.finished[2].error
    assert isinstance(error, UnavailableError)
    assert engine.finished[1].error is None
    assert engine.tokens[2] == run_alone(engine.requests[2], MAX_MODEL_LEN)[0][: len(engine.tokens[2])]
