"""The GPU's runner against the CPU's answers, token for token in float32: graphs on and off, a step ahead or not.

Without a GPU the same runner computes on the CPU, its kernels in Triton's interpreter: slow, so it does little. On a
GPU kernels and graphs are what takes time: there a model has two runners, which serve all of its tests. With the
embedded model's (`-o addopts=` does without the plugins of the other tests):

    python -m pytest -v --durations=0 -o addopts=--import-mode=importlib tests/engine/test_gpu_{parity,smollm2}.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import MAX_MODEL_LEN, PROMPTS, VOCAB_SIZE, Reference, one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import EOS
from triton_testing import DEVICE, need_triton

need_triton()

from quire.engine.core import EngineCore  # noqa: E402
from quire.engine.cpu_runner import CpuRunner  # noqa: E402
from quire.engine.gpu.runner import GpuRunner  # noqa: E402
from quire.engine.models.model import ModelDtype  # noqa: E402
from quire.engine.models.registry import load_gpu_model  # noqa: E402
from quire.engine.page_pool import PagePool  # noqa: E402
from quire.engine.runner import Runner  # noqa: E402
from quire.engine.scheduler import Scheduler, SchedulerConfig  # noqa: E402
from quire.service.checkpoint.locate import CheckpointFormat  # noqa: E402
from quire.service.request import (  # noqa: E402
    PromptLogprobs,
    Request,
    SamplingParams,
    StopConditions,
    TokenLogprobs,
)

ON_GPU = DEVICE == "cuda"
FAMILIES = ["llama", "qwen3, tied, biases, window below"]
if ON_GPU:
    # One for each branch of the kernels: the others differ in what the host makes of their files.
    FAMILIES += ["llama, one kv head", "mistral"]
# What runners hold that serve more than one test.
MOST_PAGES, MOST_SEQS, MOST_TOKENS = 40, 6, 64


class Models(Reference):
    """`gpu` computes on the GPU, `ours` on the CPU."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder, name)
        self.gpu = load_gpu_model(
            folder, CheckpointFormat.FOLDER, ModelDtype.FLOAT32, torch.device(DEVICE), lambda *_: None
        )
        self._runners: dict[bool, GpuRunner] = {}

    def runner(self, num_pages: int, max_num_seqs: int, max_num_tokens: int, *, graphs: bool) -> GpuRunner:
        """One that holds so much: on a GPU the same each time, which holds more."""
        if not ON_GPU:
            return GpuRunner(self.gpu, num_pages, max_num_seqs, max_num_tokens, MAX_MODEL_LEN, graphs=graphs)
        if graphs not in self._runners:
            self._runners[graphs] = GpuRunner(
                self.gpu, MOST_PAGES, MOST_SEQS, MOST_TOKENS, MAX_MODEL_LEN, graphs=graphs
            )
        return self._runners[graphs]

    def core(self, runner: Runner, config: SchedulerConfig, num_pages: int, *, run_ahead: bool) -> EngineCore:
        scheduler = Scheduler(config, PagePool(num_pages), frozenset({EOS}))
        return EngineCore(runner, scheduler, None, VOCAB_SIZE, run_ahead=run_ahead)


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    with one_thread():
        yield Models(tmp_path_factory.mktemp("model"), request.param)


@given(data=st.data())
@settings(deadline=None, max_examples=12 if ON_GPU else 2)
def test_any_batch_chunking_prefix_hit_and_preemption(models: Models, data: st.DataObject) -> None:
    """Batches, chunks, the cache, graphs and the step ahead must never change a token."""
    num_pages = data.draw(st.integers(6, 14), label="pages")
    max_num_seqs = data.draw(st.integers(1, 5), label="sequences")
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=data.draw(st.integers(max_num_seqs, 40), label="budget"),
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=data.draw(st.booleans(), label="caching"),
    )
    graphs = data.draw(st.booleans(), label="graphs")
    runner = models.runner(num_pages, max_num_seqs, config.max_num_batched_tokens, graphs=graphs)
    core = models.core(runner, config, num_pages, run_ahead=data.draw(st.booleans(), label="run ahead"))
    if data.draw(st.booleans(), label="graphs captured before"):
        while core.prepare():
            pass
    most_requests, most_tokens = (7, 24) if ON_GPU else (3, 5)
    outputs: dict[int, list[int]] = {}
    prompts: dict[int, tuple[int, ...]] = {}
    wanted: dict[int, int] = {}
    for key in range(data.draw(st.integers(1, most_requests), label="requests")):
        prompts[key] = data.draw(st.sampled_from(PROMPTS), label="prompt")
        wanted[key] = data.draw(st.integers(1, most_tokens), label="max_tokens")
        outputs[key] = []
        core.submit(
            key, Request(str(key), "m", prompts[key], SamplingParams(temperature=0.0), StopConditions(wanted[key]))
        )
        for _ in range(data.draw(st.integers(0, 4), label="steps")):
            collect(core, outputs)
    while core.has_work:
        collect(core, outputs)
    for key, prompt in prompts.items():
        assert outputs[key] == models.answer(prompt)[: wanted[key]], f"request {key}"


def collect(core: EngineCore, outputs: dict[int, list[int]]) -> None:
    for update in core.step():
        outputs[update.key].extend(update.token_ids)
        if update.finished is not None:
            assert update.finished.error is None


REQUESTS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.3, seed=7),
    SamplingParams(temperature=0.9, top_k=5, top_p=0.8, seed=11),
    SamplingParams(temperature=1.0, min_p=0.1, seed=2**63 + 5),
    SamplingParams(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25),
    SamplingParams(temperature=0.0, logit_bias=((17, 4.0), (40, -3.0)), bad_words=((8, 9), (30,))),
]


@pytest.mark.parametrize("run_ahead", [False, True])
def test_sampling_penalties_and_logprobs(models: Models, run_ahead: bool) -> None:
    """All that a request can ask of a draw comes out as on the CPU, and what is reported of it to 1e-4."""
    config = SchedulerConfig(MOST_SEQS, MOST_TOKENS, MAX_MODEL_LEN)
    outcomes = []
    for runner in (
        CpuRunner(models.ours, MOST_PAGES, MOST_SEQS, MAX_MODEL_LEN, "float32"),
        models.runner(MOST_PAGES, MOST_SEQS, MOST_TOKENS, graphs=True),
    ):
        core = models.core(runner, config, MOST_PAGES, run_ahead=run_ahead and isinstance(runner, GpuRunner))
        tokens: dict[int, list[int]] = {key: [] for key in range(len(REQUESTS))}
        drawn: dict[int, list[TokenLogprobs]] = {key: [] for key in tokens}
        prompts: dict[int, list[PromptLogprobs]] = {key: [] for key in tokens}
        for key, sampling in enumerate(REQUESTS):
            stop = StopConditions(10 if ON_GPU else 4, min_tokens=2 if key % 2 else 0)
            core.submit(
                key,
                Request(
                    str(key), "m", PROMPTS[key], sampling, stop, logprobs=3 if key in (0, 2, 4) else None,
                    prompt_logprobs=2 if key in (2, 3) else None,
                ),
            )  # fmt: skip
        while core.has_work:
            for update in core.step():
                tokens[update.key].extend(update.token_ids)
                drawn[update.key].extend(update.logprobs)
                if update.prompt_logprobs is not None:
                    prompts[update.key].append(update.prompt_logprobs)
        outcomes.append((tokens, drawn, prompts))
    (tokens, drawn, prompts), (gpu_tokens, gpu_drawn, gpu_prompts) = outcomes
    assert gpu_tokens == tokens
    for key in tokens:
        same_reports(drawn[key], gpu_drawn[key])
        assert [found.first for found in prompts[key]] == [found.first for found in gpu_prompts[key]]
        for found, gpu_found in zip(prompts[key], gpu_prompts[key], strict=True):
            same_reports(list(found.tokens), list(gpu_found.tokens))


def same_reports(ours: list[TokenLogprobs], gpus: list[TokenLogprobs]) -> None:
    assert len(ours) == len(gpus)
    for one, other in zip(ours, gpus, strict=True):
        assert one.rank == other.rank and [token for token, _ in one.top] == [token for token, _ in other.top]
        assert other.logprob == pytest.approx(one.logprob, abs=1e-4)
        assert [value for _, value in other.top] == pytest.approx([value for _, value in one.top], abs=1e-4)


def test_broken_weights_end_their_requests(models: Models) -> None:
    """A model whose logits are not finite must end requests with an error, and the engine must go on."""
    broken = models.gpu._norm
    models.gpu._norm = torch.full_like(broken, float("nan"))
    try:
        # Of its own: what it writes into pages is not finite.
        runner = GpuRunner(models.gpu, 8, 2, 32, MAX_MODEL_LEN, graphs=False)
        core = models.core(runner, SchedulerConfig(2, 32, MAX_MODEL_LEN), 8, run_ahead=True)
        for key in range(2):
            core.submit(key, Request(str(key), "m", PROMPTS[1], SamplingParams(temperature=0.0), StopConditions(5)))
        finished = []
        while core.has_work:
            finished += [update.finished for update in core.step() if update.finished is not None]
        assert [one.error is not None and "not finite" in one.error.message for one in finished] == [True, True]
        assert core.scheduler.pool.available == 8
    finally:
        models.gpu._norm = broken
