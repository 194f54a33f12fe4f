"""Every family against transformers in float32: logits to 1e-4, the whole engine's greedy output token for token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import MAX_MODEL_LEN, MODELS, PROMPTS, VOCAB_SIZE, Reference, one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from teacher_forced import teacher_forced_logits
from tiny_gguf import write_gguf
from tiny_models import EOS

from quire.engine.core import EngineCore
from quire.engine.cpu_runner import CpuRunner
from quire.engine.models.model import ModelDtype
from quire.engine.models.registry import FAMILIES, load_model
from quire.engine.page_pool import PagePool
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.service.checkpoint.locate import CheckpointFormat
from quire.service.request import Request, SamplingParams, StopConditions


@pytest.fixture(scope="module", params=MODELS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    with one_thread():
        yield Reference(tmp_path_factory.mktemp("model"), request.param)


def test_every_family_is_compared() -> None:
    """A family that is added without a row here would be untested."""
    assert {family for family, _ in MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize("chunk", [1, 17, 61])
def test_logits(reference: Reference, chunk: int) -> None:
    """A setting that is read wrongly may change logits without changing most tokens."""
    prompts = PROMPTS[2:6]
    for prompt, logits in zip(prompts, teacher_forced_logits(reference.ours, prompts, chunk), strict=True):
        torch.testing.assert_close(logits, reference.logits(prompt), rtol=0, atol=1e-4)


# GGUF files of these families do not say which layers have windows.
@pytest.mark.parametrize(
    "reference", [name for name, (_, shape) in MODELS.items() if not shape.get("sliding_window")], indirect=True
)
def test_logits_of_a_gguf_file(reference: Reference, tmp_path: Path) -> None:
    """llama.cpp's converter renames, reorders and computes: whatever is not undone changes the model."""
    path = write_gguf(tmp_path / "tiny.gguf", reference.theirs)
    ours = load_model(path, CheckpointFormat.GGUF, ModelDtype.FLOAT32, lambda *_: None)
    (logits,) = teacher_forced_logits(ours, PROMPTS[5:6], 61)
    torch.testing.assert_close(logits, reference.logits(PROMPTS[5]), rtol=0, atol=1e-4)


@given(data=st.data())
@settings(deadline=None, max_examples=15)
def test_any_batch_chunking_prefix_hit_and_preemption(reference: Reference, data: st.DataObject) -> None:
    """What else is in the batch, how a prompt is cut and what the cache holds must never change a token."""
    num_pages = data.draw(st.integers(6, 14), label="pages")
    max_num_seqs = data.draw(st.integers(1, 5), label="sequences")
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=data.draw(st.integers(max_num_seqs, 40), label="budget"),
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=data.draw(st.booleans(), label="caching"),
    )
    runner = CpuRunner(reference.ours, num_pages, max_num_seqs, MAX_MODEL_LEN, "float32")
    scheduler = Scheduler(config, PagePool(num_pages), frozenset({EOS}))
    core = EngineCore(runner, scheduler, None, VOCAB_SIZE, run_ahead=data.draw(st.booleans(), label="run ahead"))
    outputs: dict[int, list[int]] = {}
    prompts: dict[int, tuple[int, ...]] = {}
    wanted: dict[int, int] = {}
    for key in range(data.draw(st.integers(1, 7), label="requests")):
        prompts[key] = data.draw(st.sampled_from(PROMPTS), label="prompt")
        wanted[key] = data.draw(st.integers(1, 24), label="max_tokens")
        outputs[key] = []
        core.submit(
            key,
            Request(str(key), "m", prompts[key], SamplingParams(temperature=0.0), StopConditions(wanted[key])),
        )
        for _ in range(data.draw(st.integers(0, 4), label="steps")):
            collect(core, outputs)
    while core.has_work:
        collect(core, outputs)
    for key, prompt in prompts.items():
        assert outputs[key] == reference.answer(prompt)[: wanted[key]], f"request {key}"


def collect(core: EngineCore, outputs: dict[int, list[int]]) -> None:
    for update in core.step():
        outputs[update.key].extend(update.token_ids)
        if update.finished is not None:
            assert update.finished.error is None
