"""The choice of an engine in numbers: when a prefix is worth a queue, and what counts as being there."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from router_testing import prompt_of, request_of

from quire.router.budget import FREE_MOVES, WINDOW_SECONDS, RetryBudget
from quire.router.cost import EngineView, Expectations, expected_ttft
from quire.router.endpoint import NO_LOAD, Endpoint, Phase
from quire.router.fleet import Choice, Fleet
from quire.router.flight import Flight, Peer
from quire.router.index import page_keys
from quire.service.pages import PAGE_SIZE, prefix_hashes
from quire.service.request import CacheKey, Request
from quire.service.tracing import Tracing

MODEL = "m"
SPEED = 1000.0
EXPECTATIONS = Expectations(SPEED, 100.0)

counts = st.integers(0, 10_000)
views = st.builds(
    EngineView,
    running=st.integers(0, 300),
    waiting=st.integers(0, 300),
    pending_prefill_tokens=counts,
    pages_total=st.just(10_000),
    pages_available=counts,
    max_num_seqs=st.integers(0, 256),
    prefill_tokens_per_second=st.just(0.0) | st.floats(0.01, 1e5),
    decode_step_seconds=st.floats(0, 1),
    decode_tokens_per_step=st.just(0.0) | st.floats(1, 16),
)


class Session:
    """An engine's end that takes everything."""

    def __init__(self) -> None:
        self.submitted: list[int] = []

    def submit(self, key: int, request: Request) -> None:
        self.submitted.append(key)

    def cancel(self, key: int) -> None:
        pass


def fleet_of(count: int) -> Fleet:
    fleet = Fleet()
    for index in range(count):
        endpoint = fleet.add(f"engine-{index}")
        endpoint.connected(Session(), name=f"engine-{index}", model=MODEL, max_num_seqs=8)
        report(endpoint)
    return fleet


def report(endpoint: Endpoint, **load: float) -> None:
    measured = {"prefill_tokens_per_second": SPEED, "decode_step_seconds": 0.01, "pages_total": 100}
    endpoint.report(replace(NO_LOAD, **{**measured, "pages_available": 100, **load}))  # type: ignore[arg-type]


def keys_of(prompt: tuple[int, ...], key: CacheKey | None = None) -> list[int]:
    return page_keys(b"".join(prefix_hashes(key or CacheKey(), prompt)))


def store(endpoint: Endpoint, prompt: tuple[int, ...]) -> None:
    stored = b"".join(prefix_hashes(CacheKey(), prompt))
    for _ in endpoint.cache.snapshot(1, 1, stored):
        pass


def choose(fleet: Fleet, prompt: tuple[int, ...], avoid: set[Endpoint] | None = None) -> Choice:
    choice = fleet.choose(MODEL, keys_of(prompt), len(prompt), avoid or set())
    assert choice is not None
    return choice


def send(endpoint: Endpoint, prompt: tuple[int, ...], uncached: int) -> Flight:
    peer = Peer(lambda updates: None, lambda: None)
    request = request_of(prompt)
    flight = Flight(peer, 1, request, Tracing("test").tracer.start_span("test"), [], 0.0)
    endpoint.send(flight, request, keys_of(prompt), uncached)
    return flight


def test_an_idle_engine_takes_the_time_of_what_it_must_compute() -> None:
    """The numbers are seconds, so that a queue and a prefix can be weighed without a weight."""
    assert expected_ttft(EngineView(), 500, EXPECTATIONS) == 0.5
    assert expected_ttft(EngineView(prefill_tokens_per_second=100.0), 500, EXPECTATIONS) == 5.0
    assert expected_ttft(EngineView(pending_prefill_tokens=1500), 500, EXPECTATIONS) == 2.0
    # Half a step of those that run.
    running = EngineView(running=4, decode_step_seconds=0.02)
    assert expected_ttft(running, 500, EXPECTATIONS) == pytest.approx(0.51)
    # All 8 places taken and 3 wait: 4 of 8 that run 100 steps each must end, one every 12.5 steps.
    full = EngineView(running=8, waiting=3, max_num_seqs=8, decode_step_seconds=0.02)
    assert expected_ttft(full, 500, EXPECTATIONS) == pytest.approx(0.5 + 0.02 * (0.5 + 4 * 12.5))
    # With 4 tokens a step a request is over after 25 steps, and the step in progress still is one.
    speculating = replace(full, decode_tokens_per_step=4.0)
    assert expected_ttft(speculating, 500, EXPECTATIONS) == pytest.approx(0.5 + 0.02 * (0.5 + 4 * 12.5 / 4))
    # 100 pages in use by 8; 40 are missing: 3.2 must end.
    short = EngineView(running=8, pages_total=100, decode_step_seconds=0.02)
    assert expected_ttft(short, 640, EXPECTATIONS) == pytest.approx(0.64 + 0.02 * (0.5 + 3.2 * 12.5))


@given(views, counts, counts)
def test_more_work_never_takes_less_time(view: EngineView, uncached: int, more: int) -> None:
    """A term with the wrong sign would send everything to the busiest engine."""
    seconds = expected_ttft(view, uncached, EXPECTATIONS)
    assert 0 <= seconds < float("inf")
    assert seconds <= expected_ttft(view, uncached + more, EXPECTATIONS)
    assert seconds <= expected_ttft(replace(view, waiting=view.waiting + more), uncached, EXPECTATIONS)
    busier = replace(view, pending_prefill_tokens=view.pending_prefill_tokens + more)
    assert seconds <= expected_ttft(busier, uncached, EXPECTATIONS)
    emptier = replace(view, pages_available=view.pages_available + more)
    assert seconds >= expected_ttft(emptier, uncached, EXPECTATIONS)


@pytest.mark.parametrize(("tokens_per_step", "first"), [(1.0, 0), (1.9, 0), (2.1, 1)])
def test_drafts_are_worth_exactly_the_steps_they_save(tokens_per_step: float, first: int) -> None:
    """Steps that take twice as long for more than two tokens free a slot earlier: by the seconds alone they don't."""
    fleet = fleet_of(2)
    report(fleet.endpoints[0], running=8, waiting=2, decode_step_seconds=0.01, decode_tokens_per_step=1.0)
    report(fleet.endpoints[1], running=8, waiting=2, decode_step_seconds=0.02, decode_tokens_per_step=tokens_per_step)
    assert choose(fleet, prompt_of(1)).endpoint is fleet.endpoints[first]


@pytest.mark.parametrize(("queued", "holder_wins"), [(0, True), (900, True), (1100, False)])
async def test_a_prefix_is_worth_exactly_the_time_it_saves(queued: int, holder_wins: bool) -> None:
    """1,000 cached tokens at 1,000 a second outweigh a second's queue, and no more: by the numbers, not a threshold."""
    fleet = fleet_of(2)
    holder, other = fleet.endpoints
    prompt = prompt_of(1, pages=1000 // PAGE_SIZE)
    store(holder, prompt)
    report(holder, pending_prefill_tokens=queued)
    choice = choose(fleet, prompt)
    assert (choice.endpoint is holder) is holder_wins
    assert choice.matched_tokens == (992 if holder_wins else 0)
    assert other.view.pending_prefill_tokens == 0


@pytest.mark.parametrize(("load", "holder_wins"), [
    # A second of prefill is saved. One of 8 that run for 128 steps of 10 ms ends every 0.16 s.
    ({"running": 7}, True),
    ({"running": 8, "waiting": 2}, True),
    ({"running": 8, "waiting": 10}, False),
    # No page is free: one must be given back for the last tokens, by one of those that hold them all.
    ({"running": 8, "pages_available": 0, "decode_step_seconds": 0.01}, True),
    ({"running": 1, "pages_available": 0, "decode_step_seconds": 1.0}, False),
])  # fmt: skip
async def test_a_long_queue_or_no_free_page_costs_an_engine_its_advantage(
    load: dict[str, float], holder_wins: bool
) -> None:
    """Waiting for a place is time like any other."""
    fleet = fleet_of(2)
    holder, _ = fleet.endpoints
    prompt = prompt_of(1, pages=1000 // PAGE_SIZE)
    store(holder, prompt)
    report(holder, **load)
    assert (choose(fleet, prompt).endpoint is holder) is holder_wins


async def test_pages_that_are_being_computed_count_as_there() -> None:
    """A burst of requests with one new prefix must gather where the first of them computes it."""
    fleet = fleet_of(3)
    prompt = prompt_of(1, pages=60)
    first = choose(fleet, prompt)
    flight = send(first.endpoint, prompt, len(prompt))
    for endpoint in fleet.endpoints:
        if endpoint is not first.endpoint:
            report(endpoint, pending_prefill_tokens=500)
    # There it waits for the first one's prefill and adds 4 tokens; elsewhere for 500 tokens, and adds 964.
    second = choose(fleet, (*prompt, 1, 2, 3))
    assert (second.endpoint, second.matched_tokens) == (first.endpoint, 60 * PAGE_SIZE)
    assert second.expected_ttft == pytest.approx(0.965)
    # With the others idle it would be as soon elsewhere, within what is known, and computed twice.
    for endpoint in fleet.endpoints:
        if endpoint is not first.endpoint:
            report(endpoint)
    assert choose(fleet, (*prompt, 1, 2, 3)).endpoint is first.endpoint
    first.endpoint.release(flight)
    assert choose(fleet, (*prompt, 1, 2, 3)).matched_tokens == 0


async def test_what_was_sent_counts_until_it_is_reported() -> None:
    """Between two reports a burst would otherwise go to one engine as a whole."""
    fleet = fleet_of(3)
    chosen = []
    for topic in range(6):
        prompt = prompt_of(topic, pages=10)
        choice = choose(fleet, prompt)
        send(choice.endpoint, prompt, len(prompt))
        chosen.append(choice.endpoint.address)
    assert sorted(chosen) == sorted(["engine-0", "engine-1", "engine-2"] * 2)
    endpoint = fleet.endpoints[0]
    sent = endpoint.view.pending_prefill_tokens
    assert sent == 2 * 161
    # This report may have left before the requests came in; the next one counts them.
    report(endpoint)
    assert endpoint.view.pending_prefill_tokens == sent
    report(endpoint, pending_prefill_tokens=sent, waiting=2)
    assert endpoint.view.pending_prefill_tokens == sent and endpoint.view.waiting == 2


async def test_a_token_settles_what_was_sent() -> None:
    """A prompt that has its first token has no prefill left."""
    fleet = fleet_of(1)
    (endpoint,) = fleet.endpoints
    flight = send(endpoint, prompt_of(1), 65)
    endpoint.progress(flight, has_tokens=False)
    assert endpoint.view.pending_prefill_tokens == 65
    endpoint.progress(flight, has_tokens=True)
    assert endpoint.view.pending_prefill_tokens == 0 and endpoint.view.waiting == 0


async def test_tenants_share_no_pages() -> None:
    """With another salt the same tokens are another prompt: a hit would tell one tenant what another asked."""
    fleet = fleet_of(1)
    prompt = prompt_of(1)
    store(fleet.endpoints[0], prompt)
    assert choose(fleet, prompt).matched_tokens == 64
    other = fleet.choose(MODEL, keys_of(prompt, CacheKey("tenant")), len(prompt), ())
    assert other is not None and other.matched_tokens == 0


async def test_the_last_token_is_always_computed() -> None:
    """A prompt of whole pages that are all cached still needs its last page: it is not expected for free."""
    fleet = fleet_of(1)
    prompt = prompt_of(1, pages=4, extra=0)
    store(fleet.endpoints[0], prompt)
    assert choose(fleet, prompt).matched_tokens == 48


async def test_engines_that_a_request_left_are_the_last_resort() -> None:
    """One that has just refused will hardly take it, but if it is the only one it is better than none."""
    fleet = fleet_of(2)
    first, second = fleet.endpoints
    store(first, prompt_of(1))
    assert choose(fleet, prompt_of(1), {first}).endpoint is second
    assert choose(fleet, prompt_of(1), {first, second}).endpoint is first
    second.drains()
    assert choose(fleet, prompt_of(1), {first}).endpoint is first
    first.report(replace(NO_LOAD, phase=Phase.LOADING))
    assert fleet.choose(MODEL, [], 5, ()) is None


async def test_equal_engines_take_turns() -> None:
    """Requests one after the other must not all warm the cache of the first in the list."""
    fleet = fleet_of(4)
    assert {choose(fleet, prompt_of(topic)).endpoint.address for topic in range(4)} == {
        f"engine-{index}" for index in range(4)
    }


async def test_speeds_are_each_engines_own_and_a_new_one_is_like_the_others() -> None:
    """A fast engine gets the long prompt, and one that has measured nothing is neither shunned nor flooded."""
    fleet = fleet_of(2)
    slow, fast = fleet.endpoints
    report(slow, prefill_tokens_per_second=100.0)
    report(fast, prefill_tokens_per_second=300.0)
    fleet.learn_speeds()
    assert choose(fleet, prompt_of(1)).endpoint is fast
    new = fleet.add("engine-2")
    new.connected(Session(), name="engine-2", model=MODEL, max_num_seqs=0)
    fast.drains()
    choice = choose(fleet, prompt_of(1))
    assert choice.endpoint is new and choice.expected_ttft == pytest.approx(65 / 200)


async def test_an_engine_that_is_removed_leaves_no_pages_and_its_bit_is_used_again() -> None:
    """Engines come and go for months: the index must not grow with those that were."""
    fleet = fleet_of(1)
    for number in range(200):
        endpoint = fleet.add(f"pod-{number}")
        store(endpoint, prompt_of(number))
        fleet.remove(endpoint)
        for _ in fleet.index.sweep():
            pass
    assert len(fleet.index) == 0
    assert fleet.add("last").cache.holder < 1 << 8
    await asyncio.sleep(0)


@given(st.floats(0, 2), st.lists(st.tuples(st.floats(0, 3), st.integers(0, 100)), max_size=60))
def test_moves_stay_within_their_share(share: float, tries: list[tuple[float, int]]) -> None:
    """Whatever the order of tries: in no window more than the share of what is in flight, and a turn comes."""
    budget, now, granted = RetryBudget(share), 0.0, list[float]()
    for pause, in_flight in tries:
        now += pause
        recent = sum(1 for each in granted if each > now - WINDOW_SECONDS)
        allowed = budget.allows(now, in_flight)
        assert allowed == (recent < max(FREE_MOVES, share * in_flight))
        if allowed:
            budget.spend(now)
            granted.append(now)
        else:
            assert now < budget.next_turn(now) <= now + WINDOW_SECONDS
