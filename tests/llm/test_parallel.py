"""LLM on several ranks of this machine: the same words as on one, and no process that outlives it."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from processes import until_ended
from triton_testing import DEVICE, need_triton

need_triton()

from quire.llm import LLM, SamplingParams, StructuredOutputsParams  # noqa: E402
from quire.service.errors import InternalError  # noqa: E402

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="its processes compute on CPUs")


def test_two_ranks(checkpoint: Path, tiny: LLM) -> None:
    """From the prompt to the text, once under a grammar. If one dies the next call says so, instead of waiting."""
    before = followers()
    choice = StructuredOutputsParams(choice=["yes", "no"])
    prompts = ["One", "and another"]
    params = [
        SamplingParams(temperature=0, max_tokens=5, logprobs=1),
        SamplingParams(temperature=0, max_tokens=5, structured_outputs=choice),
    ]
    with LLM(checkpoint, tensor_parallel_size=2, device="cpu", max_model_len=64, max_num_seqs=2, threads=1) as llm:
        (rank,) = followers() - before
        found = llm.generate(prompts, params, use_tqdm=False)
        expected = tiny.generate(prompts, params, use_tqdm=False)
        assert [one.outputs[0].token_ids for one in found] == [one.outputs[0].token_ids for one in expected]
        assert found[1].outputs[0].text in ("yes", "no")
        os.kill(rank, signal.SIGKILL)
        with pytest.raises(InternalError, match="rank 1 was ended by SIGKILL: without it the model can't go on"):
            llm.generate(prompts, params, use_tqdm=False)
    assert followers() == before


def test_close_ends_the_ranks(checkpoint: Path) -> None:
    """Their GPUs are for the next LLM; a model that can't be loaded leaves none either."""
    before = followers()
    with LLM(checkpoint, tensor_parallel_size=2, device="cpu", max_model_len=64, max_num_seqs=2, threads=1):
        started = followers() - before
        assert len(started) == 1
    until_ended(started)
    (checkpoint / "model.safetensors").rename(checkpoint / "elsewhere")
    try:
        with pytest.raises(Exception, match="holds neither"):
            LLM(checkpoint, tensor_parallel_size=2, device="cpu", max_model_len=64)
    finally:
        (checkpoint / "elsewhere").rename(checkpoint / "model.safetensors")
    assert followers() == before


def followers() -> set[int]:
    """Children of this process."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found
