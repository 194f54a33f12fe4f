"""The engine's core under random arrivals, cancels, deadlines, full caches, common prefixes, grammars, drafts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
from draft_oracle import FreeSteps, Oracle
from drafting_machine import DraftingMachine
from hypothesis import HealthCheck, event, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from page_machine import EOS, VOCAB_SIZE, Grammar, PageMachine, run_alone, score

from quire.engine.core import EngineCore
from quire.engine.page_pool import PagePool
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.engine.sequence import Sequence, SequenceState, pages_for
from quire.engine.speculation.speculator import SpeculationConfig, Speculator
from quire.service.errors import OverloadedError
from quire.service.pages import PAGE_SIZE, prefix_hashes
from quire.service.request import (
    CacheKey,
    Constraint,
    ConstraintKind,
    FinishReason,
    Request,
    SamplingParams,
    StopConditions,
    Update,
)

PREFIXES = [[(7 * i + k) % VOCAB_SIZE for i in range(PAGE_SIZE * 3)] for k in range(3)]


class EngineMachine(RuleBasedStateMachine):
    """Drives an EngineCore over a PageMachine and checks its books after every step.

    Without it a leaked or doubly owned page, a lost terminal event or a stale prefix would show only under load.
    """

    DRAFTER_IN_PAGES = False
    new_runner: type[PageMachine] = PageMachine

    @initialize(
        extra_pages=st.integers(0, 4),
        max_num_seqs=st.integers(2, 5),
        budget=st.integers(5, 40),
        max_model_len=st.integers(20, 90),
        caching=st.booleans(),
        run_ahead=st.booleans(),
        quality=st.sampled_from([None, None, 0.0, 0.5, 0.9, 1.0]),
        num_drafts=st.integers(0, 6),
        num_forced=st.integers(0, 6),
        max_drafts=st.sampled_from([None, None, 0, 3]),
        on_host=st.booleans(),
        free=st.booleans(),
    )
    def start(
        self,
        extra_pages: int,
        max_num_seqs: int,
        budget: int,
        max_model_len: int,
        caching: bool,
        run_ahead: bool,
        quality: float | None,
        num_drafts: int,
        num_forced: int,
        max_drafts: int | None,
        on_host: bool,
        free: bool,
    ) -> None:
        num_pages = pages_for(max_model_len) + extra_pages
        self.pool = PagePool(num_pages)
        config = SchedulerConfig(
            max_num_seqs,
            budget,
            max_model_len,
            max_waiting=6,
            enable_prefix_caching=caching,
            max_draft_tokens=max_drafts,
            drafter_in_pages=self.DRAFTER_IN_PAGES,
        )
        self.scheduler = Scheduler(config, self.pool, frozenset({EOS}))
        self.now = 1000.0
        self.grammar = Grammar({})
        self.runner = self.new_runner(num_pages, max_num_seqs, max_model_len)
        self.speculator = None
        if quality is not None:
            # Without drafts of the host's a device that drafts is a step ahead of the host all the time.
            oracle = Oracle(self.whole, quality, VOCAB_SIZE) if on_host or not self.DRAFTER_IN_PAGES else None
            self.speculator = Speculator(
                oracle,
                SpeculationConfig(num_drafts, num_forced),
                on_device=self.DRAFTER_IN_PAGES,
                cost=FreeSteps() if free else None,
            )
        self.core = EngineCore(
            self.runner,
            self.scheduler,
            self.grammar,
            VOCAB_SIZE,
            clock=lambda: self.now,
            run_ahead=run_ahead,
            speculator=self.speculator,
        )
        self.requests: dict[int, Request] = {}
        self.outputs: dict[int, list[int]] = {}
        self.started: set[int] = set()
        self.finished: dict[int, FinishReason] = {}
        self.scores: dict[int, dict[int, float]] = {}
        self.known_pages: set[bytes] = set()
        self.ready()

    def ready(self) -> None:
        """Everything is made, and nothing has run."""

    @rule(
        prefix=st.integers(-1, 2),
        cut=st.sampled_from([PAGE_SIZE, 2 * PAGE_SIZE, 3 * PAGE_SIZE, 5, 40]),
        tail=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=20) | st.just([]),
        max_tokens=st.integers(1, 60),
        copies=st.integers(1, 3),
        salt=st.sampled_from(["", "", "other"]),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        timeout=st.none() | st.none() | st.integers(0, 30),
        resumed=st.integers(0, 10),
        stop=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=1),
        kind=st.sampled_from(["plain", "plain", "plain", "ignore_eos", "constrained", "scored"]),
    )
    def arrive(self, copies: int, **kwargs: Any) -> None:
        for _ in range(copies):
            self.submit(**kwargs)

    def submit(self, prefix, cut, tail, max_tokens, salt, priority, timeout, resumed, stop, kind) -> None:
        prompt = [*(PREFIXES[prefix][:cut] if prefix >= 0 else []), *tail] or [1]
        prompt = prompt[: self.scheduler.config.max_model_len - 1]
        key = len(self.requests)
        request = Request(
            request_id=str(key),
            model="m",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(temperature=0.0),
            stop=StopConditions(max_tokens, tuple(stop), ignore_eos=kind == "ignore_eos"),
            constraint=Constraint(ConstraintKind.REGEX, "a") if kind == "constrained" else None,
            prompt_logprobs=0 if kind == "scored" else None,
            cache_key=CacheKey(salt),
            priority=priority,
            deadline_unix_ms=None if timeout is None else int(self.now * 1000) + timeout * 1000,
        )
        # As if it had been moved here after some of its tokens.
        whole, _ = run_alone(request, self.scheduler.config.max_model_len)
        request = replace(request, output_token_ids=tuple(whole[: max(0, min(resumed, len(whole) - 1))]))
        try:
            self.core.submit(key, request)
        except OverloadedError:
            assert self.scheduler.num_waiting >= 6
            return
        self.requests[key] = request
        self.outputs[key] = list(request.output_token_ids)

    @rule(which=st.integers(0, 50), really=st.sampled_from([True, False, False]))
    def cancel(self, which: int, really: bool) -> None:
        if self.requests and really:
            self.core.cancel(which % len(self.requests))

    @rule(seconds=st.integers(0, 8), steps=st.integers(1, 12))
    def step(self, seconds: int, steps: int) -> None:
        self.now += seconds
        for _ in range(steps):
            self.take(self.core.step())
            self.check_pages()
            self.check_drafts()

    def whole(self, key: int) -> list[int]:
        request = self.requests[key]
        alone, _ = run_alone(request, self.scheduler.config.max_model_len)
        return [*request.prompt_token_ids, *alone]

    def take(self, updates: list[Update]) -> None:
        for update in updates:
            assert update.key not in self.finished, "an event after the terminal one"
            if update.started is not None:
                assert update.key not in self.started
                self.started.add(update.key)
            self.outputs[update.key].extend(update.token_ids)
            if (found := update.prompt_logprobs) is not None:
                scores = self.scores.setdefault(update.key, {})
                for position, token in enumerate(found.tokens, found.first):
                    # A preempted prompt is computed again and its tokens are reported again.
                    assert scores.setdefault(position, token.logprob) == token.logprob
            if update.finished is not None:
                self.finished[update.key] = update.finished.reason
        stored, removed = self.pool.drain_events()
        assert self.known_pages.issuperset(removed) and self.known_pages.isdisjoint(stored)
        self.known_pages -= set(removed)
        self.known_pages |= set(stored)

    def check_drafts(self) -> None:
        limit = self.scheduler.config.max_draft_tokens
        assert limit is None or sum(sequence.num_open for sequence in self.scheduler) <= limit

    def check_pages(self) -> None:
        pool, held = self.pool, [0] * self.pool.num_pages
        for sequence in self.scheduler:
            if sequence.state is not SequenceState.RUNNING:
                assert not sequence.block_table and sequence.slot == -1
                continue
            assert len(set(sequence.block_table)) == len(sequence.block_table)
            self.check_size(sequence)
            for page in sequence.block_table:
                held[page] += 1
        assert held == [pool.references(page) for page in range(pool.num_pages)]
        assert pool.available == held.count(0)
        slots = [sequence.slot for sequence in self.scheduler if sequence.state is SequenceState.RUNNING]
        assert len(set(slots)) == len(slots) == self.scheduler.num_running
        # What is findable holds the tokens that its hash says.
        assert set(pool._page_of) == self.known_pages
        for sequence in self.scheduler:
            for index in range(sequence.num_published):
                tokens = sequence.token_ids[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
                assert list(self.runner.memory[sequence.block_table[index]]) == tokens

    def check_size(self, sequence: Sequence) -> None:
        assert len(sequence.block_table) == pages_for(sequence.reach)

    @invariant()
    def hashes_match(self) -> None:
        for sequence in getattr(self, "scheduler", ()):
            assert sequence.page_hashes == prefix_hashes(sequence.request.cache_key, sequence.token_ids)

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for _ in range(5000):
            if not self.core.has_work:
                break
            self.take(self.core.step())
            self.check_pages()
        assert not self.core.has_work, "the engine does not come to an end"
        assert set(self.finished) == set(self.requests)
        assert self.pool.available == self.pool.num_pages
        for key, request in self.requests.items():
            self.check_request(key, request)
        for sequence in self.grammar.told:
            assert sequence in self.core._masking.released, "a grammar's state is kept for ever"
        event(f"preemptions: {min(self.scheduler.num_preemptions, 3)}")
        if self.speculator is not None:
            stats = self.speculator.stats
            event(f"drafts kept: {sum(stats.accepted.values()) > 0}")
            event(f"drafts dropped: {sum(stats.verified.values()) > sum(stats.accepted.values())}")
            event(f"forced tokens kept: {stats.accepted['forced'] > 0}")
            assert not self.speculator._prospects, "what is known of a sequence is kept for ever"
        event(f"prefix hits: {self.core.stats.cached_prompt_tokens > 0}")

    def check_request(self, key: int, request: Request) -> None:
        alone, broken = run_alone(request, self.scheduler.config.max_model_len)
        event(f"finished: {self.finished[key].name}")
        if self.finished[key] in (FinishReason.STOP, FinishReason.LENGTH):
            assert self.outputs[key] == alone and not broken
        else:
            assert self.outputs[key] == alone[: len(self.outputs[key])]
        scores, prompt = self.scores.get(key, {}), request.prompt_token_ids
        assert all(scores[position] == -score(prompt[:position]) for position in scores)
        if request.prompt_logprobs is not None and self.outputs[key]:
            assert list(scores) == list(range(1, len(prompt))) or request.output_token_ids
        assert request.prompt_logprobs is not None or not scores


TestEngineCore = EngineMachine.TestCase
TestEngineCore.settings = settings(
    max_examples=2000,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class DrafterMachine(EngineMachine):
    """As `EngineMachine`, with a drafter in the pages, whose slots are checked, too.

    Without it a slot that was skipped at a chunk's end, after a prefix hit or for want of a page would make drafts
    worse, which nobody sees.
    """

    DRAFTER_IN_PAGES = True
    new_runner = DraftingMachine

    def ready(self) -> None:
        self.loss, self.scheduler._loss = self.scheduler._loss, self.loss_when_nothing_is_left

    def loss_when_nothing_is_left(self, sequence: Sequence) -> tuple[bool, int, int, int]:
        """Whoever is preempted must not be so for pages that only the drafter or drafts have a use for."""
        end = sequence.reach + max(1, sequence.num_pending)
        assert max(len(sequence.block_table), pages_for(end + len(sequence.drafts))) <= pages_for(end)
        return self.loss(sequence)

    def check_size(self, sequence: Sequence) -> None:
        end, most = sequence.reach, 6
        assert pages_for(end) <= len(sequence.block_table) <= pages_for(end + most)

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "core"):
            event(f"drafted on the device: {self.runner.num_drafted > 0}")


TestDrafterInPages = DrafterMachine.TestCase
TestDrafterInPages.settings = settings(TestEngineCore.settings, max_examples=500)
