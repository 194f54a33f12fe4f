"""Several ranks against the CPU's engine, token for token in float32: processes that compute as GPUs do, over Gloo.

Without GPUs their kernels run in Triton's interpreter: slow, so one batch of each model has everything in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from draft_oracle import FreeSteps, Oracle
from drafted_requests import Output, drafted_requests, run, same_outputs
from families import one_thread
from gguf.constants import GGMLQuantizationType
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from page_machine import VOCAB_SIZE, Grammar
from tiny_eagle import tiny_eagle, write_head
from tiny_gguf import encode_as, write_gguf
from tiny_models import EOS, tiny_model
from triton_testing import DEVICE, need_triton

need_triton()

from quire.engine.config import CoreConfig, Device, Dtype, Speculation  # noqa: E402
from quire.engine.core import EngineCore  # noqa: E402
from quire.engine.cpu_runner import CpuRunner  # noqa: E402
from quire.engine.loading import load_core  # noqa: E402
from quire.engine.models.model import Model, ModelDtype  # noqa: E402
from quire.engine.models.registry import load_model  # noqa: E402
from quire.engine.page_pool import PagePool  # noqa: E402
from quire.engine.parallel.leader import Leader  # noqa: E402
from quire.engine.runner import Runner  # noqa: E402
from quire.engine.scheduler import Scheduler, SchedulerConfig  # noqa: E402
from quire.engine.speculation.speculator import SpeculationConfig, Speculator  # noqa: E402
from quire.service.checkpoint.locate import CheckpointFormat  # noqa: E402
from quire.service.request import Constraint, ConstraintKind, Request, SamplingParams, StopConditions  # noqa: E402

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="the processes of these tests compute on CPUs")

MAX_MODEL_LEN, NUM_PAGES, MAX_NUM_SEQS, BUDGET = 64, 9, 4, 40
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Case:
    """A model, and how many ranks share it."""

    family: str
    shape: dict[str, object]
    size: int = 2
    gguf: bool = False
    head: bool = False


WITH_HEAD = "llama, with a head"
CASES = {
    WITH_HEAD: Case("llama", {}, head=True),
    "mistral, a window": Case("mistral", {"sliding_window": 21}),
    # Half of its feed-forward network's columns ends within a block.
    "qwen2, biases, GGUF": Case("qwen2", {"hidden_size": 64, "num_attention_heads": 4}, gguf=True),
    "qwen3, norms of heads, tied": Case("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "llama, fewer KV heads than ranks": Case(
        "llama", {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "attention_bias": True}, size=4
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Models:
    """One on a CPU, and the same on several ranks."""

    cpu: Model
    leader: Runner

    def run(
        self,
        requests: list[Request],
        arrivals: list[int],
        limits: SchedulerConfig,
        num_pages: int,
        quality: float = 0.7,
    ) -> tuple[list[Output], list[Output], EngineCore]:
        """What requests get from both, the ranks verifying drafts of which `quality` are right; and the ranks' core."""

        def core(runner: Runner, speculator: Speculator | None, *, run_ahead: bool) -> EngineCore:
            scheduler = Scheduler(limits, PagePool(num_pages), frozenset({EOS}))
            return EngineCore(runner, scheduler, Grammar({}), VOCAB_SIZE, run_ahead=run_ahead, speculator=speculator)

        cpu = CpuRunner(self.cpu, num_pages, limits.max_num_seqs, MAX_MODEL_LEN, "float32")
        expected = run(core(cpu, None, run_ahead=False), requests, arrivals)
        whole = [[*request.prompt_token_ids, *one.token_ids] for request, one in zip(requests, expected, strict=True)]
        oracle = Oracle(lambda key: whole[key], quality, VOCAB_SIZE)
        speculator = Speculator(oracle, SpeculationConfig(3), cost=FreeSteps())
        ranks = core(self.leader, speculator, run_ahead=True)
        return run(ranks, requests, arrivals), expected, ranks


@pytest.fixture(scope="module", params=list(CASES))
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("model")
    path, kind = folder, CheckpointFormat.FOLDER
    with one_thread():
        model = tiny_model(folder, case.family, **{"vocab_size": VOCAB_SIZE, "eos_token_id": EOS, **case.shape})
        if case.gguf:
            kind = CheckpointFormat.GGUF
            path = write_gguf(folder / "tiny.gguf", model, encode_as(GGMLQuantizationType.Q8_0))
        cpu = load_model(path, kind, ModelDtype.FLOAT32, lambda *_: None)
        head = write_head(tiny_eagle(cpu.config), folder / "head", "safeail") if case.head else ""
        config = CoreConfig(
            str(path), device=Device.CPU, dtype=Dtype.FLOAT32, tensor_parallel_size=case.size,
            max_model_len=MAX_MODEL_LEN, max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=BUDGET, num_pages=NUM_PAGES,
            speculation=Speculation.AUTO, speculative_model=str(head), threads=1,
        )  # fmt: skip
        loaded = load_core(config, lambda *_: None, make_drafts=None if case.head else lambda: Oracle(list, 0, 1))  # type: ignore[arg-type, return-value]
        try:
            yield Models(cpu, loaded.core._runner)
        finally:
            loaded.core.close()


def test_a_batch_with_everything_in_it(models: Models) -> None:
    """Chunks, a shared prefix, preemption, drafts, a grammar, penalties, seeds, log-probabilities: each is a step of
    another kind, and a rank that runs another one, or none, computes something else or waits for ever."""
    assert isinstance(models.leader, Leader)
    prompt = tuple(5 + (7 * i * i + 3 * i) % 180 for i in range(46))
    stop = StopConditions(5, ignore_eos=True)
    constraint = Constraint(ConstraintKind.JSON_OBJECT)
    penalized = SamplingParams(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.5, logit_bias=((17, 4.0),))
    requests = [
        Request("0", "m", prompt, GREEDY, stop, prompt_logprobs=2),
        Request("1", "m", prompt[:5], SamplingParams(temperature=1.2, top_k=9, seed=7), stop, logprobs=2),
        Request("2", "m", (*prompt[:32], *range(9, 23)), penalized, stop, logprobs=1),
        Request("3", "m", prompt[3:9], GREEDY, StopConditions(3), constraint=constraint),
    ]
    found, expected, core = models.run(
        requests, [0, 0, 2, 3], SchedulerConfig(3, 24, MAX_MODEL_LEN, max_draft_tokens=8), 5
    )
    same_outputs(found, expected)
    drafts = core.stats.speculation
    assert drafts is not None and 0 < sum(drafts.accepted.values()) < sum(drafts.verified.values())
    assert core.scheduler.num_preemptions and core.stats.cached_prompt_tokens


@pytest.mark.parametrize("models", [WITH_HEAD], indirect=True)
@given(data=st.data())
@settings(
    deadline=None, max_examples=5, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.generate, Phase.shrink]
)
def test_any_batch(models: Models, data: st.DataObject) -> None:
    """What nobody thought of; of one model, as it takes long."""
    requests = data.draw(st.lists(drafted_requests(VOCAB_SIZE, 4), min_size=2, max_size=3), label="requests")
    arrivals = [data.draw(st.integers(0, 3), label="arrival") for _ in requests]
    limits = SchedulerConfig(
        data.draw(st.integers(1, MAX_NUM_SEQS), label="sequences"),
        data.draw(st.integers(8, BUDGET), label="budget"),
        MAX_MODEL_LEN,
        max_draft_tokens=data.draw(st.integers(1, 12), label="drafts of a step"),
    )
    num_pages = data.draw(st.integers(4, NUM_PAGES), label="pages")
    found, expected, _ = models.run(requests, arrivals, limits, num_pages, data.draw(st.sampled_from([0.5, 1.0])))
    same_outputs(found, expected)


@pytest.mark.parametrize("models", [WITH_HEAD], indirect=True)
def test_drafts_of_a_head(models: Models) -> None:
    """It runs on rank 0 alone, but the next step verifies its drafts on all ranks before the host has read them."""
    requests = [
        Request(str(i), "m", tuple(range(9 + i, 20 + 2 * i)), GREEDY, StopConditions(5, ignore_eos=True))
        for i in (0, 1)
    ]
    limits = SchedulerConfig(2, 24, MAX_MODEL_LEN, max_draft_tokens=8, drafter_in_pages=True)
    cpu = CpuRunner(models.cpu, NUM_PAGES, 2, MAX_MODEL_LEN, "float32")
    plain = SchedulerConfig(2, 24, MAX_MODEL_LEN)
    expected = run(
        EngineCore(cpu, Scheduler(plain, PagePool(NUM_PAGES), frozenset({EOS})), None, VOCAB_SIZE), requests, [0, 1]
    )
    speculator = Speculator(None, SpeculationConfig(2), on_device=True, cost=FreeSteps())
    scheduler = Scheduler(limits, PagePool(NUM_PAGES), frozenset({EOS}))
    core = EngineCore(models.leader, scheduler, None, VOCAB_SIZE, run_ahead=True, speculator=speculator)
    same_outputs(run(core, requests, [0, 1]), expected)
    assert sum(speculator.stats.verified.values()) > 0
