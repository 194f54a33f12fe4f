"""What a core that is a step ahead of its device may and may not do; the state machine runs both ways, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from draft_oracle import FreeSteps
from drafting_machine import DraftingMachine
from page_machine import EOS, VOCAB_SIZE, Grammar, Masks, PageMachine, run_alone

from quire.engine.core import EngineCore
from quire.engine.masks import DraftResult, MaskBatch, MaskRequest
from quire.engine.page_pool import PagePool
from quire.engine.plan import StepPlan
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.engine.speculation.speculator import SpeculationConfig, Speculator
from quire.service.pages import PAGE_SIZE
from quire.service.request import (
    Constraint,
    ConstraintKind,
    FinishReason,
    Request,
    SamplingParams,
    StopConditions,
    Update,
)


class Device(PageMachine):
    """Keeps the plans that it was given."""

    def __init__(self, num_pages: int, max_num_seqs: int, max_model_len: int) -> None:
        super().__init__(num_pages, max_num_seqs, max_model_len)
        self.plans: list[StepPlan] = []

    def launch(self, plan: StepPlan, *, masked: bool):  # type: ignore[no-untyped-def]
        self.plans.append(plan)
        return super().launch(plan, masked=masked)


def ahead(num_pages: int = 20, max_num_seqs: int = 4, **limits: int) -> tuple[EngineCore, Device]:
    device = Device(num_pages, max_num_seqs, num_pages * PAGE_SIZE)
    config = SchedulerConfig(max_num_seqs, limits.pop("budget", 64), num_pages * PAGE_SIZE, **limits)
    scheduler = Scheduler(config, PagePool(num_pages), frozenset({EOS}))
    return EngineCore(device, scheduler, None, VOCAB_SIZE, run_ahead=True), device


def request(key: int, prompt: int, output: int, *, stop: tuple[int, ...] = (), priority: int = 0) -> Request:
    tokens = tuple((key * 89 + 7 * i) % VOCAB_SIZE for i in range(prompt))
    conditions = StopConditions(output, stop, ignore_eos=True)
    return Request(str(key), "m", tokens, SamplingParams(temperature=0.0), conditions, priority=priority)


def run(core: EngineCore) -> list[Update]:
    updates = []
    while core.has_work:
        updates += core.step()
    return updates


def test_a_step_is_launched_before_the_last_one_is_read() -> None:
    """Else the device would wait for the host between any two steps."""
    core, device = ahead()
    core.submit(0, request(0, 5, 4))
    assert core.step() == [] and len(device.plans) == 1
    tokens = [token for update in core.step() for token in update.token_ids]
    assert len(device.plans) == 2 and len(tokens) == 1
    assert [work.start for plan in device.plans for work in plan.work] == [0, 5]


def test_an_output_of_known_length_costs_no_step_too_many() -> None:
    """Its last token is known to come: launching another step would waste a device's time for every request."""
    core, device = ahead()
    core.submit(0, request(0, 5, 4))
    updates = run(core)
    assert len(device.plans) == 4
    assert updates[-1].finished is not None and updates[-1].finished.reason is FinishReason.LENGTH


def test_a_stop_costs_one_and_what_it_draws_is_dropped() -> None:
    """A token after the end must reach nobody: neither the caller nor, as a page, somebody else's prompt."""
    whole, _ = run_alone(request(0, 13, 12), 320)
    stop = request(0, 13, 50, stop=(whole[2],))
    core, device = ahead()
    core.submit(0, stop)
    updates = run(core)
    assert [token for update in updates for token in update.token_ids] == whole[:3]
    assert len(device.plans) == 4
    # The stop fills the first page, which the dropped step computed: it holds what its hash says.
    page = core.scheduler.pool._page_of
    assert len(page) == 1
    assert list(device.memory[next(iter(page.values()))]) == [*stop.prompt_token_ids, *whole[:3]]


def test_preempted_before_its_token_is_read() -> None:
    """The token is drawn all the same, and must not be drawn twice or lost."""
    core, _ = ahead(num_pages=8, max_num_seqs=3)
    for key in range(3):
        core.submit(key, request(key, 30, 40, priority=key))
    updates = run(core)
    assert core.scheduler.num_preemptions > 0
    for key in range(3):
        tokens = [token for update in updates if update.key == key for token in update.token_ids]
        assert tokens == run_alone(request(key, 30, 40), 8 * PAGE_SIZE)[0]


def test_cancelled_while_its_step_runs() -> None:
    """Its pages and slot are given to the next one at once, whose step comes later; nothing more is said of it."""
    core, _ = ahead(num_pages=4, max_num_seqs=1)
    core.submit(0, request(0, 40, 10))
    core.submit(1, request(1, 40, 5))
    core.step()
    core.cancel(0)
    updates = run(core)
    mine = [update for update in updates if update.key == 0]
    assert len(mine) == 1 and mine[0].finished is not None and mine[0].finished.reason is FinishReason.CANCELLED
    tokens = [token for update in updates if update.key == 1 for token in update.token_ids]
    assert tokens == run_alone(request(1, 40, 5), 4 * PAGE_SIZE)[0]


def test_prompts_ride_on_decodes_in_small_chunks() -> None:
    """While most of the batch decodes, a long prompt must neither stall it nor be stalled."""
    core, device = ahead(num_pages=60, max_num_seqs=4, budget=200, max_mixed_tokens=20)
    for key in range(2):
        core.submit(key, request(key, 10, 60))
    core.step()
    core.submit(2, request(2, 190, 2))
    run(core)
    chunks = [work.num_tokens for plan in device.plans[1:] for work in plan.work if work.num_tokens > 1]
    assert chunks[0] == 18 and sum(chunks) == 190
    assert max(sum(work.num_tokens for work in plan.work) for plan in device.plans[1:]) == 20
    # With less than half of the batch in decode, all of the budget is a prompt's.
    core, device = ahead(num_pages=60, max_num_seqs=4, budget=200, max_mixed_tokens=20)
    core.submit(0, request(0, 10, 60))
    core.step()
    core.submit(2, request(2, 190, 2))
    run(core)
    assert max(sum(work.num_tokens for work in plan.work) for plan in device.plans[1:]) == 191


class DraftingDevice(DraftingMachine):
    """Keeps the plans that it was given; all of its drafts are right."""

    def __init__(self, num_pages: int, max_num_seqs: int, max_model_len: int) -> None:
        super().__init__(num_pages, max_num_seqs, max_model_len)
        self.quality = 1.0
        self.whole: list[int] = []
        self.plans: list[StepPlan] = []

    def launch(self, plan: StepPlan, *, masked: bool):  # type: ignore[no-untyped-def]
        self.plans.append(plan)
        return super().launch(plan, masked=masked)

    def guess(self, text: list[int]) -> int:
        return self.whole[len(text)] if len(text) < len(self.whole) else super().guess(text)


def drafting(
    grammar: Grammar | None = None, num_pages: int = 20, max_mixed_tokens: int = 0
) -> tuple[EngineCore, DraftingDevice]:
    room = num_pages * PAGE_SIZE
    device = DraftingDevice(num_pages, 4, room)
    limits = SchedulerConfig(4, 64, room, max_mixed_tokens=max_mixed_tokens, drafter_in_pages=True)
    speculator = Speculator(None, SpeculationConfig(3), on_device=True, cost=FreeSteps())
    scheduler = Scheduler(limits, PagePool(num_pages), frozenset({EOS}))
    return EngineCore(device, scheduler, grammar, VOCAB_SIZE, run_ahead=True, speculator=speculator), device


def test_drafts_of_the_device_are_verified_before_the_host_has_read_them() -> None:
    """Else it would wait for the host between any two steps with drafts, a tenth of the time."""
    core, device = drafting()
    core.submit(0, request(0, 5, 41))
    updates = run(core)
    assert [token for update in updates for token in update.token_ids] == run_alone(request(0, 5, 41), 320)[0]
    assert not any(plan.drafts for plan in device.plans)
    # The prompt's step draws one token and each other four.
    assert [plan.work[0].num_open for plan in device.plans] == [0, 0, *[3] * 9]


def test_drafts_take_no_room_from_prompts() -> None:
    """Else prompts take longer where there are drafts, and so does all that comes after them."""
    core, device = drafting(num_pages=60, max_mixed_tokens=20)
    for key in range(2):
        core.submit(key, request(key, 10, 120))
    core.step()
    core.submit(2, request(2, 190, 2))
    run(core)
    mixed = [plan.work for plan in device.plans[1:] if any(work.num_tokens > 4 for work in plan.work)]
    assert [work.num_tokens for works in mixed[:10] for work in works if work.num_tokens > 4] == [18] * 10
    assert all(sum(work.num_tokens for work in works) == 18 + 2 * 4 for works in mixed[1:10])


class ShortGrammar(Grammar):
    """Says nothing of what comes after the first draft."""

    def begin(self, requests: Sequence[MaskRequest], released: Sequence[int]) -> Masks:
        batch = super().begin(requests, released).batch
        results = {key: DraftResult(min(1, found.num_drafts), ()) for key, found in batch.results.items()}
        return Masks(MaskBatch(batch.rows, batch.errors, results))


def test_what_follows_drafts_that_the_grammar_did_not_get_to_is_void() -> None:
    """The device takes them for right and goes on behind them; the output would have a gap."""
    core, device = drafting(ShortGrammar({}))
    constraint = Constraint(ConstraintKind.REGEX, "a")
    stop = StopConditions(30)
    one = max(
        (replace(request(key, 5, 30), constraint=constraint, stop=stop) for key in range(100)),
        key=lambda one: len(run_alone(one, 320)[0]),
    )
    output, _ = run_alone(one, 320)
    device.whole = [*one.prompt_token_ids, *output]
    core.submit(0, one)
    updates = run(core)
    assert [token for update in updates for token in update.token_ids] == output and len(output) > 20
    assert any(work.num_open for plan in device.plans for work in plan.work)
