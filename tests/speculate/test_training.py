"""Training a head on a tiny model: it learns what counts, stops and goes on; what is measured is what is accepted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import greedy, tiny_llama

from quire.engine.models.decoder import Decoder
from quire.engine.models.model import ModelDtype
from quire.engine.models.registry import load_model
from quire.engine.speculation.eagle.head import load_eagle
from quire.service.checkpoint.locate import Checkpoint, CheckpointFormat
from quire.service.errors import ConfigError
from quire.speculate.batches import Batch, most_written
from quire.speculate.dialogues import Dialogue
from quire.speculate.draft_model import load_draft_model
from quire.speculate.evaluate import _walk, greedy_acceptance
from quire.speculate.target import FrozenTarget
from quire.speculate.train import STATE_FILE, TrainConfig, Trainer, TrainProgress

VOCAB_SIZE = 64


class Tiny:
    """A target and what it wrote: greedy outputs after random prompts."""

    def __init__(self, folder: Path) -> None:
        model = tiny_llama(
            folder, vocab_size=VOCAB_SIZE, num_hidden_layers=4, max_position_embeddings=128, initializer_range=0.2
        )
        self.checkpoint = Checkpoint(folder, CheckpointFormat.FOLDER, "tiny")
        self.target = FrozenTarget(self.checkpoint, torch.device("cpu"), torch.float32)
        generator = torch.Generator().manual_seed(1)
        self.dialogues = []
        for _ in range(12):
            prompt = torch.randint(3, VOCAB_SIZE, (8,), generator=generator).tolist()
            output = greedy(model, prompt, 40)
            self.dialogues.append(Dialogue("greedy", [*prompt, *output], [(8, 8 + len(output))]))

    def trainer(self, output: Path, **changed: object) -> Trainer:
        config = {
            "epochs": 50, "draft_vocab_size": 60, "steps": 3, "batch_tokens": 512, "learning_rate": 0.02, **changed
        }  # fmt: skip
        return Trainer(self.target, self.dialogues, TrainConfig(**config), output, "tiny")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    with one_thread():
        yield Tiny(tmp_path_factory.mktemp("model"))


def ignore(_: TrainProgress) -> None:
    return


def never() -> bool:
    return False


def test_a_head_learns_to_foresee_its_target(tiny: Tiny, tmp_path: Path) -> None:
    """A label that is one token off still makes the loss fall, but no draft would ever be accepted."""
    trainer = tiny.trainer(tmp_path)
    before = greedy_acceptance(trainer.model, tiny.target, tiny.dialogues, 3)["greedy"]
    assert trainer.run(ignore, never)
    trainer.finish()
    after = greedy_acceptance(load_draft_model(tmp_path, tiny.target), tiny.target, tiny.dialogues, 3)["greedy"]
    assert before.length < 1.3
    assert after.length > 1.5
    branched = greedy_acceptance(trainer.model, tiny.target, tiny.dialogues, 3, num_siblings=3)["greedy"]
    assert branched.length > after.length and branched.steps < after.steps
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["target"] == "tiny" and len(report["held_out_accuracies"]) == 3
    engine = load_model(tiny.checkpoint.path, CheckpointFormat.FOLDER, ModelDtype.FLOAT32, lambda *_: None)
    assert isinstance(engine, Decoder)
    assert load_eagle(tmp_path, engine, ModelDtype.FLOAT32).config.taps == trainer.model.config.taps


def test_a_stopped_training_goes_on_as_if_nothing_was(tiny: Tiny, tmp_path: Path) -> None:
    """An hour of a GPU must not be lost with a Ctrl-C, nor an epoch begin again with what was learned already."""
    whole = tiny.trainer(tmp_path / "whole", epochs=5, batch_tokens=128)
    assert whole.run(ignore, never)
    stops = 0
    while True:
        part = tiny.trainer(tmp_path / "parts", epochs=5, batch_tokens=128)
        steps = iter([False, False, False])
        if part.run(ignore, lambda steps=steps: next(steps, True)):  # type: ignore[misc]
            break
        stops += 1
    assert stops > 2
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(part.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "parts" / STATE_FILE).is_file()
    part.finish()
    assert not (tmp_path / "parts" / STATE_FILE).is_file()


def test_another_training_is_not_gone_on_with(tiny: Tiny, tmp_path: Path) -> None:
    """Two settings mixed in one head would be told apart by nobody."""
    tiny.trainer(tmp_path).run(ignore, lambda: True)
    with pytest.raises(ConfigError) as error:
        tiny.trainer(tmp_path, steps=4)
    assert "holds a training with steps 3 and now it is 4: name another folder" in error.value.message


@pytest.mark.parametrize(
    ("setting", "value"),
    [("epochs", 0), ("steps", 0), ("batch_tokens", -1), ("learning_rate", 2), ("step_decay", 1.5), ("max_minutes", 0)],
)
def test_wrong_settings(setting: str, value: float) -> None:
    """A flag that can't work is said before a model is loaded."""
    with pytest.raises(ConfigError) as error:
        TrainConfig(**{setting: value})  # type: ignore[arg-type]
    assert f"--{setting.replace('_', '-')} is {value}" in error.value.message


@given(st.lists(st.integers(0, 4), min_size=20, max_size=20), st.integers(1, 10), st.integers(2, 10))
@settings(deadline=None)
def test_a_walk_ends_where_the_output_does(right: list[int], begin: int, length: int) -> None:
    """Tokens a step are what a user gets: each token but the first is counted once, and no step gives none."""
    found = _walk(right, begin, begin + length, 4)
    assert found.tokens == length - 1
    assert 1 <= found.steps <= found.tokens
    assert sum(found.accepted) + found.steps >= found.tokens
    assert list(found.rates) == sorted(found.rates, reverse=True)


def test_batches_mark_what_the_target_wrote() -> None:
    """Prompts teach the head what it never drafts; padding must teach it nothing."""
    batch = Batch.of([Dialogue("a", [5, 6, 7, 8, 9], [(2, 4)]), Dialogue("b", [3], [(0, 1)])], 4)
    assert batch.token_ids[:, :4].tolist() == [[5, 6, 7, 8], [3, 0, 0, 0]]
    assert batch.wanted[:, :4].tolist() == [[False, False, True, True], [True, False, False, False]]
    assert not batch.token_ids[:, 4:].any() and not batch.wanted[:, 4:].any()


def test_draft_tokens_are_the_most_written_ones() -> None:
    """A token that can't be drafted is rejected each time that it comes."""
    dialogues = [Dialogue("a", [1, 9, 9, 9, 4, 4, 7, 2], [(1, 7)])]
    ids, share = most_written(dialogues, 2, 12)
    assert ids.tolist() == [4, 9] and share == pytest.approx(5 / 6)
    ids, share = most_written(dialogues, 5, 12)
    assert ids.tolist() == [0, 1, 4, 7, 9] and share == 1
