"""Trees of drafts on a GPU's runner: no output changes, and what is sampled is distributed as the model says."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import page_machine
import pytest
import torch
from draft_oracle import FreeSteps
from drafted_requests import drafted_requests, run, same_outputs
from families import one_thread
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tiny_models import EOS
from torch import Tensor
from triton_testing import need_triton

need_triton()

from markov_model import MarkovHead, MarkovModel  # noqa: E402

from quire.engine.core import EngineCore  # noqa: E402
from quire.engine.gpu.runner import GpuRunner  # noqa: E402
from quire.engine.page_pool import PagePool  # noqa: E402
from quire.engine.scheduler import Scheduler, SchedulerConfig  # noqa: E402
from quire.engine.speculation.speculator import SpeculationConfig, Speculator  # noqa: E402
from quire.service.pages import PAGE_SIZE  # noqa: E402
from quire.service.request import Constraint, ConstraintKind, Request, SamplingParams, StopConditions  # noqa: E402

VOCAB_SIZE, PROMPT, LENGTH, SEQS = 5, (1, 2), 8, 64


def windows(table: Tensor, length: int) -> list[Tensor]:
    """Of outputs of so many tokens: what the probability of each three tokens that follow one another is, by where they
    begin, float64 [V, V, V] each."""
    chances = table.double().softmax(-1)
    state = torch.zeros(VOCAB_SIZE, VOCAB_SIZE, dtype=torch.float64)
    state[PROMPT] = 1.0
    found = []
    for _ in range(length - 2):
        # Of the last two tokens, and the three after them.
        found.append(torch.einsum("ab,abc,bcd,cde->cde", state, chances, chances, chances))
        state = torch.einsum("ab,abc->bc", state, chances)
    return found


@cache
def tables() -> tuple[Tensor, Tensor]:
    """A model's, and that of a head which is often wrong, and then often right in its second choice."""
    generator = torch.Generator().manual_seed(1)
    shape = (page_machine.VOCAB_SIZE,) * 3
    model = torch.randn(shape, generator=generator)
    return model, model + 0.4 * torch.randn(shape, generator=generator)


@given(data=st.data())
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
def test_no_tree_changes_an_output(data: st.DataObject) -> None:
    """Whoever else is in the batch, whatever they want, and whenever they leave it: a sibling that is kept where
    another token would have been drawn, or whose page, text or count is that of the draft beside it, would change the
    rest."""
    model_table, head_table = tables()
    vocab_size = len(model_table)
    requests = st.one_of(
        drafted_requests(vocab_size, 24, (None, Constraint(ConstraintKind.JSON_OBJECT))),
        st.builds(
            Request, st.just("r"), st.just("m"),
            st.lists(st.integers(3, vocab_size - 1), min_size=1, max_size=30).map(tuple),
            st.sampled_from([SamplingParams(temperature=0.0), SamplingParams(seed=5)]),
            st.integers(1, 40).map(lambda count: StopConditions(count, ignore_eos=True)),
        ),
    )  # fmt: skip
    wanted = data.draw(st.lists(requests, min_size=1, max_size=6), label="requests")
    arrivals = [data.draw(st.integers(0, 9), label="arrival") for _ in wanted]
    cancelled = data.draw(
        st.dictionaries(st.integers(0, len(wanted) - 1), st.integers(1, 12), max_size=2), label="cancelled"
    )
    cancels = {key: arrivals[key] + steps for key, steps in cancelled.items()}
    num_seqs, num_pages = data.draw(st.integers(1, 4), label="sequences"), data.draw(st.integers(5, 14), label="pages")
    most_drafts = data.draw(st.sampled_from([3, 8, 40]), label="drafts of a step")
    limits = SchedulerConfig(
        num_seqs,
        data.draw(st.integers(num_seqs, 60), label="budget"),
        5 * PAGE_SIZE,
        enable_prefix_caching=data.draw(st.booleans(), label="caching"),
        max_draft_tokens=most_drafts,
    )
    num_drafts = data.draw(st.integers(1, 5), label="drafts")
    num_siblings = data.draw(st.integers(1, 5), label="siblings")
    model: Any = MarkovModel(model_table)
    head: Any = MarkovHead(model, head_table)

    def core(limits: SchedulerConfig, head: Any, speculator: Speculator | None, *, run_ahead: bool) -> EngineCore:
        runner = GpuRunner(
            model, num_pages, num_seqs, limits.max_num_batched_tokens, limits.max_model_len, graphs=False,
            max_draft_tokens=most_drafts, num_siblings=num_siblings, head=head,
        )  # fmt: skip
        scheduler, grammar = Scheduler(limits, PagePool(num_pages), frozenset({EOS})), page_machine.Grammar({})
        return EngineCore(runner, scheduler, grammar, vocab_size, run_ahead=run_ahead, speculator=speculator)

    expected = run(core(limits, None, None, run_ahead=False), wanted, arrivals)
    speculator = Speculator(
        None, SpeculationConfig(num_drafts, num_siblings=num_siblings), on_device=True, cost=FreeSteps()
    )
    trees = core(
        replace(limits, drafter_in_pages=True), head, speculator, run_ahead=data.draw(st.booleans(), label="run ahead")
    )
    found = run(trees, wanted, arrivals, cancels)
    stats = speculator.stats
    event(f"siblings kept: {stats.accepted_siblings > 0}, preempted: {trees.scheduler.num_preemptions > 0}")
    for key in cancels:
        if found[key].reason == "CANCELLED":
            count = len(found[key].token_ids)
            assert found[key].token_ids == expected[key].token_ids[:count]
            expected[key] = found[key]
    same_outputs(found, expected)


@pytest.mark.parametrize(
    ("num_siblings", "run_ahead"), [(0, True), (3, True), (3, False)], ids=["chain", "tree", "tree, in step"]
)
def test_what_is_sampled_is_distributed_as_the_model_says(num_siblings: int, run_ahead: bool) -> None:
    """To keep too many drafts or second choices, which are likely tokens, or to draw what comes after one from what
    belongs to another, would bend every sampled answer."""
    count, table = 3000, torch.randn(3 * (VOCAB_SIZE,), generator=torch.Generator().manual_seed(0))
    requests = [
        Request(str(key), "m", PROMPT, SamplingParams(seed=key), StopConditions(LENGTH, ignore_eos=True))
        for key in range(count)
    ]
    model: Any = MarkovModel(table)
    head: Any = MarkovHead(model, table)
    limits = SchedulerConfig(SEQS, 1024, 32, max_waiting=count, max_draft_tokens=6 * SEQS, drafter_in_pages=True)
    with one_thread():
        runner = GpuRunner(
            model, 2 * SEQS, SEQS, 1024, 32, graphs=False, max_draft_tokens=6 * SEQS, num_siblings=num_siblings,
            head=head,
        )  # fmt: skip
        scheduler = Scheduler(limits, PagePool(2 * SEQS), frozenset())
        settings = SpeculationConfig(3, num_siblings=num_siblings)
        speculator = Speculator(None, settings, on_device=True, cost=FreeSteps())
        core = EngineCore(runner, scheduler, None, VOCAB_SIZE, run_ahead=run_ahead, speculator=speculator)
        found = run(core, requests, [0] * count)
    stats = speculator.stats
    assert stats.accepted["eagle"] > count
    assert (stats.accepted_siblings > count / 2) == (num_siblings > 0)
    outputs = torch.tensor([one.token_ids for one in found])
    for start, exact in enumerate(windows(table, LENGTH)):
        places = outputs[:, start : start + 3] @ torch.tensor([VOCAB_SIZE**2, VOCAB_SIZE, 1])
        observed = torch.bincount(places, minlength=VOCAB_SIZE**3).double()
        expected = exact.flatten() * count
        common = expected >= 5
        cells = [(observed[common], expected[common]), (observed[~common].sum(), expected[~common].sum())]
        statistic = sum(float(((o - e) ** 2 / e).sum()) for o, e in cells if float(e.sum()) > 0)
        freedom = int(common.sum())
        # Five deviations of a chi-square distribution, and what its tail has more than a normal one's.
        assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 8, f"tokens from {start} on"
