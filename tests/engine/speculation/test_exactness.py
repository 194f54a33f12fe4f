"""Outputs with drafts are those without, whoever drafts and however well: on a real model, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from draft_oracle import FreeSteps, Oracle
from drafted_requests import drafted_requests, run, same_outputs
from families import one_thread
from hypothesis import event, given, settings
from hypothesis import strategies as st
from tiny_eagle import tiny_eagle, write_head
from tiny_models import EOS, tiny_llama
from transformers import LlamaForCausalLM

from quire.engine.core import EngineCore
from quire.engine.cpu_runner import CpuRunner
from quire.engine.models.model import Model, ModelDtype
from quire.engine.models.registry import load_model
from quire.engine.page_pool import PagePool
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.engine.speculation.drafts import DraftRequest
from quire.engine.speculation.eagle.drafter import EagleDrafter
from quire.engine.speculation.eagle.head import load_eagle
from quire.engine.speculation.speculator import SpeculationConfig, Speculator
from quire.service.checkpoint.locate import CheckpointFormat
from quire.service.request import Request, SamplingParams, StopConditions

VOCAB_SIZE = 120
MAX_MODEL_LEN = 64


@dataclass(frozen=True)
class Target:
    """A tiny model, and heads for it."""

    model: Model
    theirs: LlamaForCausalLM
    heads: dict[str, Path]

    def drafter(self, kind: str, max_num_seqs: int) -> EagleDrafter:
        return EagleDrafter(load_eagle(self.heads[kind], self.model, ModelDtype.FLOAT32), max_num_seqs)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with one_thread():
        folder = tmp_path_factory.mktemp("model")
        theirs = tiny_llama(folder, vocab_size=VOCAB_SIZE)
        model = load_model(folder, CheckpointFormat.FOLDER, ModelDtype.FLOAT32, lambda *_: None)
        heads = {}
        for kind in ("eagle3", "eagle"):
            heads[kind] = write_head(tiny_eagle(model.config, kind), tmp_path_factory.mktemp(kind), "safeail")
        yield Target(model, theirs, heads)


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_no_drafter_changes_an_output(target: Target, data: st.DataObject) -> None:
    """A draft that is kept where another token would have been drawn, a page or a penalty that counts a draft that is
    not kept: each would change the rest of the output."""
    wanted = data.draw(st.lists(drafted_requests(VOCAB_SIZE), min_size=1, max_size=5), label="requests")
    arrivals = [data.draw(st.integers(0, 12), label="arrival") for _ in wanted]
    max_num_seqs = data.draw(st.integers(1, 4), label="sequences")
    num_pages = data.draw(st.integers(4, 12), label="pages")
    limits = SchedulerConfig(max_num_seqs, data.draw(st.integers(8, 40), label="budget"), MAX_MODEL_LEN)
    kind = data.draw(st.sampled_from(["oracle", "oracle", "eagle3", "eagle"]), label="drafter")
    quality = data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]), label="quality")
    num_drafts = data.draw(st.integers(1, 6), label="drafts")

    def core(speculator: Speculator | None, drafter: EagleDrafter | None) -> EngineCore:
        runner = CpuRunner(target.model, num_pages, max_num_seqs, MAX_MODEL_LEN, "float32", drafter)
        scheduler = Scheduler(limits, PagePool(num_pages), frozenset({EOS}))
        return EngineCore(runner, scheduler, None, VOCAB_SIZE, speculator=speculator)

    expected = run(core(None, None), wanted, arrivals)
    if kind == "oracle":
        drafter, on_device = None, False
        whole: Callable[[int], list[int]] = lambda key: [*wanted[key].prompt_token_ids, *expected[key].token_ids]  # noqa: E731
        source = Oracle(whole, quality, VOCAB_SIZE)
    else:
        drafter, on_device, source = target.drafter(kind, max_num_seqs), True, None
    speculator = Speculator(source, SpeculationConfig(num_drafts), on_device=on_device, cost=FreeSteps())
    found = run(core(speculator, drafter), wanted, arrivals)
    event(f"{kind}: drafts kept: {sum(speculator.stats.accepted.values()) > 0}")
    same_outputs(found, expected)


class Likely(Oracle):
    """Proposes what the model finds most likely, one token after another, as a good head does."""

    def __init__(self, target: Target) -> None:
        super().__init__(lambda _: (), 1.0, VOCAB_SIZE)
        self._best = cache(partial(most_likely, target.theirs))

    def _propose(self, request: DraftRequest, now: list[int]) -> tuple[int, ...]:
        tokens = list(now)
        for _ in range(request.num_tokens):
            tokens.append(self._best(tuple(tokens)))
        return tuple(tokens[len(now) :])


@torch.inference_mode()
def most_likely(theirs: LlamaForCausalLM, token_ids: tuple[int, ...]) -> int:
    return int(theirs(torch.tensor([token_ids])).logits[0, -1].argmax())


def test_what_is_sampled_is_distributed_as_the_model_says(target: Target) -> None:
    """Drafts are likely tokens: to keep too many of them, or too few, would bend every sampled answer."""
    count, prompt = 3000, (5, 6, 7)
    wanted = [
        Request(str(key), "m", prompt, SamplingParams(seed=key), StopConditions(3, ignore_eos=True))
        for key in range(count)
    ]
    runner = CpuRunner(target.model, 64, 32, MAX_MODEL_LEN, "float32")
    scheduler = Scheduler(SchedulerConfig(32, 256, MAX_MODEL_LEN, max_waiting=count), PagePool(64), frozenset({EOS}))
    speculator = Speculator(Likely(target), SpeculationConfig(1), cost=FreeSteps())
    found = run(EngineCore(runner, scheduler, None, VOCAB_SIZE, speculator=speculator), wanted, [0] * count)
    assert sum(speculator.stats.verified.values()) > count / 4
    assert sum(speculator.stats.accepted.values()) > count / 20
    # Second tokens, which are drawn in front of a draft or after it, by the first.
    for first in range(VOCAB_SIZE):
        seconds = [one.token_ids[1] for one in found if one.token_ids[0] == first]
        if len(seconds) < 150:
            continue
        with torch.inference_mode():
            exact = target.theirs(torch.tensor([[*prompt, first]])).logits[0, -1].softmax(-1) * len(seconds)
        common = exact >= 5
        observed = torch.bincount(torch.tensor(seconds), minlength=VOCAB_SIZE).float()
        cells = [(observed[common], exact[common]), (observed[~common].sum(), exact[~common].sum())]
        statistic = sum(float(((o - e) ** 2 / e).sum()) for o, e in cells if float(e.sum()) > 0)
        freedom = int(common.sum())
        # Six deviations of a chi-square distribution, and what its tail has more than a normal one's.
        assert statistic < freedom + 6 * math.sqrt(2 * freedom) + 12
