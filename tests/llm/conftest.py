"""A tiny random model and the embedded one, each loaded once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_checkpoint import tiny_checkpoint

from quire.llm import LLM


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny(checkpoint: Path) -> Iterator[LLM]:
    """One for the tests that leave it as it was, but for its cache."""
    with LLM(checkpoint, dtype="float32", max_model_len=256, max_num_seqs=8) as llm:
        yield llm


@pytest.fixture(scope="session")
def smollm() -> Iterator[LLM]:
    with LLM(max_model_len=1024, max_num_seqs=8) as llm:
        yield llm
