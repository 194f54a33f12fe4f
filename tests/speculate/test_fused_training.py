"""What makes training fast must not change what is learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from families import one_thread
from tiny_models import tiny_llama
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from quire.service.checkpoint.locate import Checkpoint, CheckpointFormat
from quire.speculate import compiled
from quire.speculate.batches import Batch
from quire.speculate.compiled import Compiled, as_written
from quire.speculate.dialogues import Dialogue
from quire.speculate.draft_model import DraftModel, Unroll
from quire.speculate.loss import StepLoss, unrolled_losses
from quire.speculate.target import FrozenTarget
from quire.speculate.train import head_config

VOCAB_SIZE = 96
STEPS = 5
# Spans begin before, at and after the first token that each step can draft, and end before and at the dialogue's end.
SPANS = [(17, [(0, 17)]), (40, [(1, 3), (9, 38)]), (33, [(4, 33)]), (8, [(6, 8)]), (1, [(0, 1)])]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrozenTarget]:
    folder = tmp_path_factory.mktemp("model")
    with one_thread():
        tiny_llama(folder, vocab_size=VOCAB_SIZE, num_hidden_layers=3, max_position_embeddings=48)
        checkpoint = Checkpoint(folder, CheckpointFormat.FOLDER, "tiny")
        yield FrozenTarget(checkpoint, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def batch() -> Batch:
    torch.manual_seed(1)
    dialogues = [Dialogue("a", torch.randint(3, VOCAB_SIZE, (n,)).tolist(), spans) for n, spans in SPANS]
    return Batch.of(dialogues, 48)


def head_for(target: FrozenTarget, *, norm_before_residual: bool = False) -> DraftModel:
    config = replace(head_config(target.config, 64), norm_before_residual=norm_before_residual)
    torch.manual_seed(2)
    model = DraftModel(config, target.embedding, torch.randperm(VOCAB_SIZE)[:64].sort().values)
    for parameter in model.parameters():
        # Scores far from each other: each key counts somewhere.
        parameter.data = 0.3 * torch.randn_like(parameter) + (parameter.ndim == 1)
    return model


def learned(model: DraftModel, target: FrozenTarget, batch: Batch) -> tuple[list[StepLoss], dict[str, Tensor]]:
    losses = unrolled_losses(model, target, batch, STEPS)
    model.zero_grad()
    # Unlike weights: no step's gradient may stand for another's.
    sum((step.loss * (index + 1) for index, step in enumerate(losses)), torch.zeros(())).backward()
    return losses, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_both_ways_give_the_same_losses_and_gradients(
    target: FrozenTarget, batch: Batch, norm_before_residual: bool
) -> None:
    """A gradient that leaves out a draft's key still lets the loss fall, to a worse head."""
    model = head_for(target, norm_before_residual=norm_before_residual)
    fused, gradients = learned(model, target, batch)
    model.fused = False
    plain, expected = learned(model, target, batch)
    for found, wanted in zip(fused, plain, strict=True):
        torch.testing.assert_close(found.loss, wanted.loss)
        assert found.accuracy == wanted.accuracy
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() < 1e-4 * gradient.norm(), name


@torch.no_grad()
def test_losses_are_those_of_each_token_on_its_own(target: FrozenTarget, batch: Batch) -> None:
    """Rows are chosen and labels told for all dialogues at once: one off, and a head learns what it never drafts."""
    model = head_for(target)
    states = target.hidden_states(batch.token_ids, model.config.taps)
    of_all = target.logits(states.last)
    hidden, unroll = model.fuse(states.tapped), Unroll()
    for step, found in enumerate(unrolled_losses(model, target, batch, STEPS)):
        hidden = model(batch.token_ids.roll(-1 - step, 1), hidden, unroll)
        logits, entropies, right = model.logits(hidden), [], []
        for row, (length, spans) in enumerate(SPANS):
            for begin, end in spans:
                for place in range(max(begin, 2 + step), min(end, length)):
                    likeliest = of_all[row, place - 1].argmax()
                    known = likeliest in model.target_ids
                    shares = of_all[row, place - 1, model.target_ids].softmax(-1)
                    drafted = logits[row, place - 2 - step]
                    entropies.append(known * F.cross_entropy(drafted, shares).item())
                    right.append(float(model.target_ids[drafted.argmax()] == likeliest))
        assert found.loss.item() == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
        assert found.accuracy.item() == pytest.approx(sum(right) / len(right))


def test_a_batch_without_answers_teaches_nothing(target: FrozenTarget) -> None:
    """A mean over no tokens is no number, and would make none of all that was learned."""
    model = head_for(target)
    losses, gradients = learned(model, target, Batch.of([Dialogue("a", [5, 6, 7], [])], 48))
    assert [step.loss.item() for step in losses] == [0.0] * STEPS
    assert not any(gradient.any() for gradient in gradients.values())


def test_another_number_of_rows_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches differ in their number of tokens: compiled for each, training would do little else."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr(compiled, "_compiles", lambda _: True)

    @Compiled
    def scaled(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return x * y * weight

    weight = torch.randn(8)
    for rows in (30, 31, 64, 500):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(scaled(x, x + 1, weight), x * (x + 1) * weight)
    assert counter.frame_count == 1
    with as_written():
        scaled(torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8), weight)
    assert counter.frame_count == 1
