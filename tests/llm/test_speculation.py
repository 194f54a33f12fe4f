"""`speculative_config`: another way to the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_eagle import tiny_eagle, write_head

from quire.engine.models.model import ModelDtype
from quire.engine.models.registry import load_model
from quire.llm import LLM, SamplingParams
from quire.service.checkpoint.locate import CheckpointFormat
from quire.service.errors import ModelError

PROMPTS = [[5, 6, 7, 8, 9, 10] * 4, [40, 41, 42], [9, 8, 7, 6] * 8]


def answers(llm: LLM) -> list[tuple[int, ...]]:
    params = [
        SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=3, max_tokens=60, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True),
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("method", ["suffix", "eagle3", "eagle"])
def test_every_method_gives_the_same_tokens(tiny: LLM, checkpoint: Path, tmp_path: Path, method: str) -> None:
    """Who turns speculation on wants time, not other answers."""
    config: dict[str, object] = {"method": method, "num_speculative_tokens": 4}
    if method != "suffix":
        target = load_model(checkpoint, CheckpointFormat.FOLDER, ModelDtype.FLOAT32, lambda *_: None)
        config["model"] = write_head(tiny_eagle(target.config, method), tmp_path / "head", "safeail")
    with LLM(checkpoint, dtype="float32", max_model_len=256, max_num_seqs=8, speculative_config=config) as llm:
        assert answers(llm) == answers(tiny)


def test_a_head_that_is_none_is_named(checkpoint: Path, tmp_path: Path) -> None:
    """It must be told from a model that is wrong."""
    with pytest.raises(ModelError, match="name the folder of an EAGLE head"):
        LLM(checkpoint, speculative_config={"method": "eagle3", "model": tmp_path})
