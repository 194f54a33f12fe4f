"""Drafts on a GPU: outputs are those of a CPU's engine without any, in float32, whatever else a request asks for.

Without a GPU the same runner computes on the CPU, its kernels in Triton's interpreter: slow, so it does little.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from draft_oracle import FreeSteps, Oracle
from drafted_requests import drafted_requests, run, same_outputs
from families import one_thread
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from page_machine import VOCAB_SIZE, Grammar
from tiny_models import EOS, tiny_model
from triton_testing import DEVICE, examples, need_triton

need_triton()

from quire.engine.core import EngineCore  # noqa: E402
from quire.engine.cpu_runner import CpuRunner  # noqa: E402
from quire.engine.gpu.runner import GpuRunner  # noqa: E402
from quire.engine.models.gpu_decoder import GpuDecoder  # noqa: E402
from quire.engine.models.model import Model, ModelDtype  # noqa: E402
from quire.engine.models.registry import load_gpu_model, load_model  # noqa: E402
from quire.engine.page_pool import PagePool  # noqa: E402
from quire.engine.runner import Runner  # noqa: E402
from quire.engine.scheduler import Scheduler, SchedulerConfig  # noqa: E402
from quire.engine.speculation.speculator import SpeculationConfig, Speculator  # noqa: E402
from quire.service.checkpoint.locate import CheckpointFormat  # noqa: E402
from quire.service.request import Constraint, ConstraintKind, Request, SamplingParams, StopConditions  # noqa: E402

ON_GPU = DEVICE == "cuda"
MAX_MODEL_LEN = 64
CONSTRAINTS = (None, None, Constraint(ConstraintKind.JSON_OBJECT))


@dataclass(frozen=True)
class Models:
    """One on both devices."""

    cpu: Model
    gpu: GpuDecoder


@pytest.fixture(scope="module", params=["llama", "mistral"] if ON_GPU else ["llama"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    with one_thread():
        folder = tmp_path_factory.mktemp("model")
        window = {"sliding_window": 21} if request.param == "mistral" else {}
        tiny_model(folder, request.param, vocab_size=VOCAB_SIZE, **window)
        given = (folder, CheckpointFormat.FOLDER, ModelDtype.FLOAT32)
        yield Models(load_model(*given, lambda *_: None), load_gpu_model(*given, torch.device(DEVICE), lambda *_: None))


@given(data=st.data())
@settings(deadline=None, max_examples=examples(12, 60), suppress_health_check=[HealthCheck.too_slow])
def test_no_draft_changes_an_output(models: Models, data: st.DataObject) -> None:
    """A draft that is kept where another token would have been drawn, a mask or a penalty of another place, a token
    behind a wrong draft that somebody reads: each would change the rest of the output."""
    requests = drafted_requests(VOCAB_SIZE, 24 if ON_GPU else 10, CONSTRAINTS)
    wanted = data.draw(st.lists(requests, min_size=1, max_size=6 if ON_GPU else 3), label="requests")
    arrivals = [data.draw(st.integers(0, 6), label="arrival") for _ in wanted]
    limits = SchedulerConfig(
        data.draw(st.integers(1, 4), label="sequences"),
        data.draw(st.integers(8, 40), label="budget"),
        MAX_MODEL_LEN,
        enable_prefix_caching=data.draw(st.booleans(), label="caching"),
        max_draft_tokens=data.draw(st.integers(1, 24), label="drafts of a step"),
    )
    num_pages = data.draw(st.integers(4, 12), label="pages")
    num_drafts = data.draw(st.integers(1, 8), label="drafts")
    quality = data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]), label="quality")

    def core(runner: Runner, speculator: Speculator | None, *, run_ahead: bool) -> EngineCore:
        scheduler = Scheduler(limits, PagePool(num_pages), frozenset({EOS}))
        return EngineCore(runner, scheduler, Grammar({}), VOCAB_SIZE, run_ahead=run_ahead, speculator=speculator)

    cpu = CpuRunner(models.cpu, num_pages, limits.max_num_seqs, MAX_MODEL_LEN, "float32")
    expected = run(core(cpu, None, run_ahead=False), wanted, arrivals)
    oracle = Oracle(lambda key: [*wanted[key].prompt_token_ids, *expected[key].token_ids], quality, VOCAB_SIZE)
    speculator = Speculator(oracle, SpeculationConfig(num_drafts), cost=FreeSteps())
    gpu = GpuRunner(
        models.gpu,
        num_pages,
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
        MAX_MODEL_LEN,
        graphs=data.draw(st.booleans(), label="graphs"),
        max_draft_tokens=limits.max_draft_tokens or 0,
    )
    found = run(core(gpu, speculator, run_ahead=data.draw(st.booleans(), label="run ahead")), wanted, arrivals)
    event(f"drafts kept: {sum(speculator.stats.accepted.values()) > 0}")
    same_outputs(found, expected)


def test_a_grammar_that_ends_behind_a_draft_it_allows(models: Models) -> None:
    """The draft is drawn, and what is drawn after it does not count: nor does its log-probability."""
    stop, constraint = StopConditions(9), Constraint(ConstraintKind.JSON_OBJECT)
    greedy = SamplingParams(temperature=0.0)
    wanted = [Request("r", "m", (3, 127), greedy, stop, logprobs=0, constraint=constraint)]
    limits = SchedulerConfig(1, 8, MAX_MODEL_LEN, max_draft_tokens=1)

    def core(speculator: Speculator | None) -> EngineCore:
        runner = GpuRunner(models.gpu, 4, 1, 8, MAX_MODEL_LEN, max_draft_tokens=1)
        scheduler = Scheduler(limits, PagePool(4), frozenset({EOS}))
        return EngineCore(runner, scheduler, Grammar({}), VOCAB_SIZE, speculator=speculator)

    expected = run(core(None), wanted, [0])
    assert expected[0].reason == "ERROR"
    for quality in (1.0, 0.9, 0.8, 0.7):
        oracle = Oracle(lambda _: [3, 127, *expected[0].token_ids], quality, VOCAB_SIZE)
        speculator = Speculator(oracle, SpeculationConfig(1), cost=FreeSteps())
        same_outputs(run(core(speculator), wanted, [0]), expected)
