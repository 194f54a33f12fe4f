"""The head that comes with the package: it fits the embedded model, drafts for it, and is what its card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import one_thread

from quire.engine.models.model import ModelDtype
from quire.engine.speculation.eagle.head import load_eagle
from quire.engine.speculation.heads import shipped_head
from quire.llm import LLM, SamplingParams
from quire.service.checkpoint.locate import EMBEDDED_MODEL, locate
from quire.speculate.dialogues import Dialogue
from quire.speculate.draft_model import load_draft_model
from quire.speculate.evaluate import greedy_acceptance
from quire.speculate.prompts import PROMPTS
from quire.speculate.target import FrozenTarget

MAX_BYTES = 24_000_000


@pytest.fixture(scope="module")
def head() -> Path:
    path = shipped_head(EMBEDDED_MODEL)
    assert path is not None
    return path


def test_only_models_that_have_a_head_get_one() -> None:
    """A head of another model would be drafted with in vain."""
    assert shipped_head("llama-8b") is None
    assert shipped_head("") is None
    assert shipped_head("..") is None


def test_it_is_small_and_has_a_card(head: Path) -> None:
    """Whoever installs the package gets it, wanted or not."""
    assert sum(file.stat().st_size for file in head.iterdir()) < MAX_BYTES
    card = (head / "README.md").read_text()
    assert all(word in card for word in (EMBEDDED_MODEL, "quire speculate data", "quire speculate train", "Limits"))
    settings = json.loads((head / "config.json").read_text())
    assert settings["speculators_config"]["verifier"]["name_or_path"] == EMBEDDED_MODEL


@pytest.mark.slow
def test_it_drafts_for_the_embedded_model(head: Path) -> None:
    """Wrong weights, or a mapping that is off by one, load well and are never accepted."""
    checkpoint = locate()
    target = FrozenTarget(checkpoint, torch.device("cpu"), torch.float32)
    ids = load_eagle(head, target, ModelDtype.BFLOAT16).target_ids.tolist()
    assert ids == sorted(set(ids))
    with one_thread(), LLM(max_model_len=512, max_num_seqs=8) as llm:
        outputs = llm.chat(
            [[{"role": "user", "content": prompt}] for prompt in PROMPTS["json"][:4]],
            SamplingParams(temperature=0, max_tokens=32),
            use_tqdm=False,
        )
    dialogues = []
    for output in outputs:
        prompt, answer = output.prompt_token_ids, output.outputs[0].token_ids
        dialogues.append(Dialogue("json", [*prompt, *answer], [(len(prompt), len(prompt) + len(answer))]))
    found = greedy_acceptance(load_draft_model(head, target), target, dialogues, 4)["json"]
    assert found.steps > 20
    assert found.length > 1.7, found
