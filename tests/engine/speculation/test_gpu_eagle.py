"""An EAGLE head in a GPU's pages: its drafts are those of the text alone, and no draft changes an output.

Without a GPU the same runner computes on the CPU, its kernels in Triton's interpreter: slow, so it does little.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from draft_oracle import FreeSteps
from families import MAX_MODEL_LEN, PROMPTS, VOCAB_SIZE, Reference, one_thread
from hypothesis import event, given, settings
from hypothesis import strategies as st
from tiny_eagle import tiny_eagle, write_head
from tiny_models import EOS
from torch import Tensor
from triton_testing import DEVICE, need_triton

need_triton()

from quire.engine.config import CoreConfig, Dtype, LoadFormat, Speculation  # noqa: E402
from quire.engine.core import EngineCore  # noqa: E402
from quire.engine.gpu.eagle import load_gpu_eagle  # noqa: E402
from quire.engine.gpu.runner import GpuRunner  # noqa: E402
from quire.engine.loading import load_core  # noqa: E402
from quire.engine.models.model import ModelDtype  # noqa: E402
from quire.engine.models.registry import load_gpu_model  # noqa: E402
from quire.engine.page_pool import PagePool  # noqa: E402
from quire.engine.plan import StepPlan, StepResult  # noqa: E402
from quire.engine.runner import DeviceInfo, StepMasks  # noqa: E402
from quire.engine.scheduler import Scheduler, SchedulerConfig  # noqa: E402
from quire.engine.speculation.speculator import SpeculationConfig, Speculator  # noqa: E402
from quire.service.checkpoint.locate import CheckpointFormat  # noqa: E402
from quire.service.request import Request, SamplingParams, StopConditions  # noqa: E402

ON_GPU = DEVICE == "cuda"


class Heads(Reference):
    """A model and a head for it on the device, and both as transformers' own modules."""

    def __init__(self, folder: Path, name: str, kind: str) -> None:
        super().__init__(folder, name)
        device = torch.device(DEVICE)
        self.gpu = load_gpu_model(folder, CheckpointFormat.FOLDER, ModelDtype.FLOAT32, device, lambda *_: None)
        self.reference = tiny_eagle(self.gpu.config, kind)
        self.head = load_gpu_eagle(write_head(self.reference, folder / "head", "safeail"), self.gpu)
        self.states = cache(self._states)

    @torch.inference_mode()
    def _states(self, text: tuple[int, ...]) -> Tensor:
        """What the head takes of each of the text's tokens."""
        states = self.theirs(torch.tensor([text]), output_hidden_states=True).hidden_states
        if self.reference.kind == "eagle":
            return states[-1][0]
        fused: Tensor = self.reference.modules["fc"](torch.cat([states[tap][0] for tap in self.head.config.taps], -1))
        return fused

    @torch.inference_mode()
    def check(self, text: tuple[int, ...], drafts: tuple[int, ...], siblings: tuple[int, ...]) -> None:
        """Each of `drafts` must be what the head finds most likely, all of the text before it, without pages; each of
        `siblings`, if there are any, what it finds most likely after that."""
        reference, embedding = self.reference, self.theirs.get_input_embeddings()
        ids = reference.target_ids.tolist() if reference.kind == "eagle3" else list(range(VOCAB_SIZE))
        hidden, tokens = self.states(text)[:-1], list(text[1:])
        for place, draft in enumerate(drafts):
            out = reference.hidden(embedding(torch.tensor(tokens)), hidden)
            if reference.kind == "eagle":
                logits = self.theirs.get_output_embeddings()(out[-1])
            else:
                logits = reference.modules["lm_head"](reference.modules["norm"](out[-1]))
            assert logits[ids.index(draft)] >= logits.max() - 1e-3, f"draft {place}"
            if siblings:
                logits[ids.index(draft)] = -torch.inf
                assert logits[ids.index(siblings[place])] >= logits.max() - 1e-3, f"sibling {place}"
            hidden, tokens = torch.cat((hidden, out[-1:])), [*tokens, draft]


@pytest.fixture(scope="module", params=[("llama", "eagle3"), ("llama, tied", "eagle")], ids=lambda pair: pair[1])
def heads(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Heads]:
    with one_thread():
        yield Heads(tmp_path_factory.mktemp("model"), *request.param)


@dataclass(frozen=True)
class Checked:
    """A step that was read when it was launched."""

    result: StepResult

    def draw(self, masks: StepMasks | None) -> None:
        """Nobody masks anything."""

    def wait(self) -> StepResult:
        return self.result


@dataclass
class CheckingRunner:
    """A runner whose drafts are checked and then replaced, on the device, too: what the head drafts decides nothing.
    Each is right with probability `quality`, and so is each sibling of one that is wrong."""

    heads: Heads
    runner: GpuRunner
    quality: float
    whole: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    texts: dict[int, list[int]] = field(default_factory=dict)
    random: random.Random = field(default_factory=lambda: random.Random(0))
    num_told: int = 0
    told: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def info(self) -> DeviceInfo:
        return self.runner.info

    def launch(self, plan: StepPlan, *, masked: bool) -> Checked:
        for admission in plan.admissions:
            self.texts[admission.slot] = list(admission.token_ids)
        result, told = self.runner.launch(plan, masked=masked).wait(), {}
        siblings: dict[int, tuple[int, ...]] = {}
        self.told.update({drafts.slot: drafts.token_ids for drafts in plan.drafts})
        for index, work in enumerate(plan.work):
            text = self.texts[work.slot]
            if work.sample:
                drafts = self.told.get(work.slot, ())[: result.accepted.get(index, 0)]
                text += [*result.kept.get(index, drafts), result.token_ids[index]]
            assert len(result.drafts.get(index, ())) == work.num_wanted
            if work.num_wanted:
                self.heads.check(tuple(text), result.drafts[index], result.siblings.get(index, ()))
                drafts, others = self.tell(text, work.num_wanted)
                self.told[work.slot] = told[index] = drafts
                row = self.runner._batch.token_ids[work.slot]
                assert row[len(text) : len(text) + len(drafts)].tolist() == list(result.drafts[index])
                row[len(text) : len(text) + len(drafts)] = torch.tensor(drafts, dtype=row.dtype)
                if index in result.siblings:
                    siblings[index], row = others, self.runner._batch.siblings[work.slot]
                    assert row[: len(others)].tolist() == list(result.siblings[index])
                    row[: len(others)] = torch.tensor(others, dtype=row.dtype)
        return Checked(replace(result, drafts=told, siblings=siblings))

    def prepare(self) -> bool:
        return self.runner.prepare()

    def close(self) -> None:
        self.runner.close()

    def tell(self, text: list[int], count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        prompt = max((prompt for prompt in PROMPTS if tuple(text[: len(prompt)]) == prompt), key=len)
        # A step that runs ahead may draw behind the answer's end.
        truth = [*prompt, *self.heads.answer(prompt), *[0] * MAX_MODEL_LEN][len(text) : len(text) + count]
        self.num_told += count
        drafts = tuple(token if self.random.random() < self.quality else (token + 1) % VOCAB_SIZE for token in truth)
        siblings = tuple(
            token if token != draft and self.random.random() < self.quality else (token + 2) % VOCAB_SIZE
            for token, draft in zip(truth, drafts, strict=True)
        )
        return drafts, siblings


@given(data=st.data())
@settings(deadline=None, max_examples=40 if ON_GPU else 2)
def test_drafts_are_those_of_the_text_alone_and_change_nothing(heads: Heads, data: st.DataObject) -> None:
    """A slot that was not written after a chunk, a hit, a preemption or a wrong draft, or one that was but shouldn't,
    makes drafts worse, which nobody sees; a draft that is wrong and kept would be seen by everybody."""
    num_pages = data.draw(st.integers(6, 14), label="pages")
    max_num_seqs = data.draw(st.integers(1, 4), label="sequences")
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=data.draw(st.integers(max_num_seqs, 40), label="budget"),
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=data.draw(st.booleans(), label="caching"),
        max_draft_tokens=12,
        drafter_in_pages=True,
    )
    graphs = data.draw(st.booleans(), label="graphs")
    num_siblings = data.draw(st.sampled_from([0, 4]), label="siblings")
    runner = CheckingRunner(
        heads,
        GpuRunner(
            heads.gpu, num_pages, max_num_seqs, config.max_num_batched_tokens, MAX_MODEL_LEN, graphs=graphs,
            max_draft_tokens=12, num_siblings=num_siblings, head=heads.head,
        ),
        data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]), label="quality"),
    )  # fmt: skip
    num_drafts = data.draw(st.integers(1, 4), label="drafts")
    settings = SpeculationConfig(num_drafts, num_siblings=num_siblings)
    speculator = Speculator(None, settings, on_device=True, cost=FreeSteps())
    core = EngineCore(
        runner,
        Scheduler(config, PagePool(num_pages), frozenset({EOS})),
        None,
        VOCAB_SIZE,
        run_ahead=data.draw(st.booleans(), label="run ahead"),
        speculator=speculator,
    )
    most_requests, most_tokens = (7, 24) if ON_GPU else (3, 9)
    outputs: dict[int, list[int]] = {}
    prompts: dict[int, tuple[int, ...]] = {}
    wanted: dict[int, int] = {}
    for key in range(data.draw(st.integers(1, most_requests), label="requests")):
        prompts[key] = data.draw(st.sampled_from(PROMPTS), label="prompt")
        wanted[key] = data.draw(st.integers(1, most_tokens), label="max_tokens")
        outputs[key] = []
        stop = StopConditions(wanted[key])
        core.submit(key, Request(str(key), "m", prompts[key], SamplingParams(temperature=0.0), stop))
        for _ in range(data.draw(st.integers(0, 4), label="steps")):
            collect(core, outputs)
    while core.has_work:
        collect(core, outputs)
    for key, prompt in prompts.items():
        assert outputs[key] == heads.answer(prompt)[: wanted[key]], f"request {key}"
    event(f"told: {runner.num_told > 0}, kept: {sum(speculator.stats.accepted.values()) > 0}")
    event(f"siblings kept: {speculator.stats.accepted_siblings > 0}")
    event(f"preempted: {core.scheduler.num_preemptions > 0}, hits: {core.stats.cached_prompt_tokens > 0}")
    assert core.scheduler.pool.available == num_pages


def collect(core: EngineCore, outputs: dict[int, list[int]]) -> None:
    for update in core.step():
        outputs[update.key].extend(update.token_ids)
        if update.finished is not None:
            assert update.finished.error is None


def test_a_batch_with_everything_in_it(heads: Heads) -> None:
    """What few random batches do all of: chunks, hits, preemption, drafts of which some are right."""
    check_batch(heads, 8, num_siblings=0, run_ahead=True)


@pytest.mark.parametrize("heads", [("llama", "eagle3")], indirect=True, ids=["eagle3"])
@pytest.mark.parametrize("run_ahead", [True, False], ids=["ahead", "in step"])
def test_a_batch_with_siblings_in_it(heads: Heads, run_ahead: bool) -> None:
    """The same, and siblings that are right where drafts are not; the host knows neither before they are verified, or
    both. One whose keys and values stay behind the drafts, or that is told to the host as the draft beside it, changes
    the rest of the output."""
    check_batch(heads, 12, num_siblings=2, run_ahead=run_ahead)


def check_batch(heads: Heads, num_tokens: int, *, num_siblings: int, run_ahead: bool) -> None:
    requests, num_pages = [5, 8, 6, 7], 6
    config = SchedulerConfig(3, 20, MAX_MODEL_LEN, max_draft_tokens=12, drafter_in_pages=True)
    runner = CheckingRunner(
        heads,
        GpuRunner(
            heads.gpu, num_pages, 3, 20, MAX_MODEL_LEN, max_draft_tokens=12, num_siblings=num_siblings, head=heads.head
        ),
        0.7,
    )
    settings = SpeculationConfig(2, num_siblings=num_siblings)
    speculator = Speculator(None, settings, on_device=True, cost=FreeSteps())
    scheduler = Scheduler(config, PagePool(num_pages), frozenset({EOS}))
    core = EngineCore(runner, scheduler, None, VOCAB_SIZE, run_ahead=run_ahead, speculator=speculator)
    outputs: dict[int, list[int]] = {key: [] for key in range(len(requests))}
    for key, number in enumerate(requests):
        stop = StopConditions(num_tokens)
        core.submit(key, Request(str(key), "m", PROMPTS[number], SamplingParams(temperature=0.0), stop))
    while core.has_work:
        collect(core, outputs)
    for key, number in enumerate(requests):
        assert outputs[key] == heads.answer(PROMPTS[number])[:num_tokens], f"request {key}"
    verified, accepted = (sum(counts.values()) for counts in (speculator.stats.verified, speculator.stats.accepted))
    assert 0 < accepted < verified
    assert (speculator.stats.accepted_siblings > 0) == (num_siblings > 0)
    assert scheduler.num_preemptions and core.stats.cached_prompt_tokens


def core_config(heads: Heads, **others: object) -> CoreConfig:
    settings = {"model": str(heads.folder), "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 2, "dtype": Dtype.FLOAT32}
    return CoreConfig(**settings | {"speculation": Speculation.AUTO, "num_pages": 20} | others)  # type: ignore[arg-type]


def load(config: CoreConfig, monkeypatch: pytest.MonkeyPatch) -> EngineCore:
    """As on a GPU, but for the size of its memory."""
    monkeypatch.setattr("quire.engine.loading.choose_device", lambda _: torch.device(DEVICE))
    monkeypatch.setattr("quire.engine.loading.size_pages", lambda *_: 20)
    return load_core(config, lambda *_: None).core


def drafted(core: EngineCore) -> int:
    """How many tokens the head drafted for a prompt."""
    core.submit(0, Request("0", "m", PROMPTS[1], SamplingParams(temperature=0.0), StopConditions(3, ignore_eos=True)))
    while core.has_work:
        core.step()
    assert core.stats.speculation is not None
    return core.stats.speculation.drafted["eagle"]


def test_a_head_is_loaded_with_the_model(heads: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its folder. Without one a GPU runs ahead instead of drafting: full batches are faster then."""
    named = str(heads.folder / "head")
    assert drafted(load(core_config(heads, speculative_model=named), monkeypatch))
    assert load(core_config(heads), monkeypatch).stats.speculation is None


def test_a_head_of_random_weights(heads: Heads, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder with nothing but config.json, as published ones have it, is enough to measure what drafting costs."""
    settings = json.loads((heads.folder / "config.json").read_text())
    settings |= {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 50, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = core_config(heads, speculative_model=str(tmp_path), load_format=LoadFormat.DUMMY)
    assert drafted(load(config, monkeypatch))
