"""The whole engine against transformers: greedy output, token for token, in float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import EOS, greedy, tiny_llama
from transformers import LlamaForCausalLM

from quire.engine.core import EngineCore
from quire.engine.cpu_runner import CpuRunner
from quire.engine.models.model import Model, ModelDtype
from quire.engine.models.registry import load_model
from quire.engine.page_pool import PagePool
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.service.checkpoint.locate import CheckpointFormat
from quire.service.request import Request, SamplingParams, StopConditions

VOCAB_SIZE = 259
MAX_MODEL_LEN = 96
PROMPTS = [tuple(3 + (p * 37 + i * i * (p + 1)) % 250 for i in range(n)) for p, n in enumerate((1, 7, 16, 33, 48, 60))]
# Prompts that begin like others, so that pages are shared; one is another's whole pages and nothing more.
PROMPTS += [(*PROMPTS[4][:40], 9, 8, 7), PROMPTS[4][:32], PROMPTS[5] + (250,)]
SHAPES = [
    {"num_attention_heads": 6, "num_key_value_heads": 2},
    {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 64, "tie_word_embeddings": True},
    {"num_attention_heads": 8, "num_key_value_heads": 1, "hidden_size": 64, "head_dim": 16, "rms_norm_eps": 1e-5},
]


class Reference:
    """A model on both sides, and transformers' answers, each computed once."""

    def __init__(self, folder: Path, seed: int, shape: dict[str, object]) -> None:
        self.theirs: LlamaForCausalLM = tiny_llama(folder, seed=seed, vocab_size=VOCAB_SIZE, **shape)
        self.ours: Model = load_model(folder, CheckpointFormat.FOLDER, ModelDtype.FLOAT32, lambda *_: None)
        self.answer = cache(lambda prompt: greedy(self.theirs, list(prompt), 24))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    return [Reference(tmp_path_factory.mktemp("model"), seed, shape) for seed, shape in enumerate(SHAPES)]


@given(data=st.data())
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_batch_chunking_prefix_hit_and_preemption(references: list[Reference], data: st.DataObject) -> None:
    """What else is in the batch, how a prompt is cut and what the cache holds must never change a token."""
    reference = data.draw(st.sampled_from(references))
    num_pages = data.draw(st.integers(6, 14), label="pages")
    max_num_seqs = data.draw(st.integers(1, 5), label="sequences")
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=data.draw(st.integers(max_num_seqs, 40), label="budget"),
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=data.draw(st.booleans(), label="caching"),
    )
    runner = CpuRunner(reference.ours, num_pages, max_num_seqs, MAX_MODEL_LEN, "float32")
    core = EngineCore(runner, Scheduler(config, PagePool(num_pages), frozenset({EOS})), None, VOCAB_SIZE)
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
