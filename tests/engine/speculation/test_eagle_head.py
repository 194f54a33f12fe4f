"""An EAGLE head over pages: the same as without them, as transformers' modules and as the head that is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from families import MAX_MODEL_LEN, MODELS, PROMPTS, Reference, one_thread
from safetensors.torch import load_file
from tiny_eagle import TinyEagle, tiny_eagle, write_head
from torch import Tensor

from quire.engine.models.decoder import Decoder
from quire.engine.models.model import ForwardBatch, HiddenTaps, ModelDtype
from quire.engine.sequence import pages_for
from quire.engine.speculation.eagle.head import EagleHead, load_eagle
from quire.service.checkpoint.locate import Checkpoint, CheckpointFormat
from quire.service.pages import PAGE_SIZE
from quire.speculate.draft_model import DraftModel, Unroll
from quire.speculate.target import FrozenTarget

LAYOUTS = [("eagle3", "safeail"), ("eagle3", "speculators"), ("eagle", "safeail pickled"), ("eagle", "speculators")]
SEQUENCES = [PROMPTS[5], PROMPTS[3], PROMPTS[2], PROMPTS[1]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    with one_thread():
        yield Reference(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def target(reference: Reference) -> Decoder:
    assert isinstance(reference.ours, Decoder)
    return reference.ours


def step(parts: list[tuple[int, int, int]], tokens: list[Tensor]) -> ForwardBatch:
    """Tokens `start` to `stop` of each sequence (its number, start, stop); sequence s has pages of its own."""
    counts = torch.tensor([stop - start for _, start, stop in parts])
    positions = torch.cat([torch.arange(start, stop) for _, start, stop in parts])
    most = pages_for(MAX_MODEL_LEN)
    # From the last page on, so that a page's number is not its index.
    tables = torch.arange(len(SEQUENCES) * most - 1, -1, -1, dtype=torch.int32).view(-1, most)
    tables = tables[[number for number, _, _ in parts]]
    pages = tables.repeat_interleave(counts, 0)[torch.arange(len(positions)), positions // PAGE_SIZE].to(torch.int64)
    stops = torch.tensor([stop for _, _, stop in parts], dtype=torch.int32)
    return ForwardBatch(
        token_ids=torch.cat([tokens[number][start:stop] for number, start, stop in parts]),
        positions=positions,
        slot_mapping=pages * PAGE_SIZE + positions % PAGE_SIZE,
        query_start=torch.cat((torch.zeros(1), counts.cumsum(0))).to(torch.int32),
        context_lens=stops,
        block_tables=tables,
        logit_rows=torch.arange(len(positions)),
        max_query_len=int(counts.max()),
        max_context_len=int(stops.max()),
    )


def chunks(tokens: list[Tensor], size: int) -> Iterator[list[tuple[int, int, int]]]:
    for start in range(0, max(map(len, tokens)), size):
        yield [(n, start, min(start + size, len(t))) for n, t in enumerate(tokens) if start < len(t)]


@torch.inference_mode()
def tapped_states(target: Decoder, taps: tuple[int, ...], tokens: list[Tensor], chunk: int) -> list[Tensor]:
    cache = target.new_kv_cache(len(SEQUENCES) * pages_for(MAX_MODEL_LEN))
    found: list[list[Tensor]] = [[] for _ in tokens]
    for parts in chunks(tokens, chunk):
        batch = step(parts, tokens)
        kept = HiddenTaps.new(taps, len(batch.token_ids), target.config.hidden_size)
        target.forward(batch, cache, kept)
        for (number, _, _), rows in zip(parts, kept.hidden.split(batch.query_start.diff().tolist()), strict=True):
            found[number].append(rows)
    return [torch.cat(parts) for parts in found]


@torch.inference_mode()
def run_head(
    head: EagleHead, states: list[Tensor], tokens: list[Tensor], chunk: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states and logits of every row of all sequences, computed `chunk` rows at a time."""
    pages = head.new_kv_pages(len(SEQUENCES) * pages_for(MAX_MODEL_LEN))
    shifted = [sequence[1:] for sequence in tokens]
    hidden: list[list[Tensor]] = [[] for _ in tokens]
    logits: list[list[Tensor]] = [[] for _ in tokens]
    for parts in chunks(shifted, chunk):
        batch = step(parts, shifted)
        fused = head.fuse(torch.cat([states[number][start:stop] for number, start, stop in parts]))
        outs = head.forward(batch, fused, pages)
        counts = batch.query_start.diff().tolist()
        for found, out in zip((hidden, logits), outs, strict=True):
            for (number, _, _), rows in zip(parts, out.split(counts), strict=True):
                found[number].append(rows)
    return [torch.cat(parts) for parts in hidden], [torch.cat(parts) for parts in logits]


@pytest.mark.parametrize("chunk", [7, 61])
def test_taps_are_the_layers_inputs(reference: Reference, target: Decoder, chunk: int) -> None:
    """A state of the wrong layer, or of before a residual is added, makes every trained head useless."""
    tokens = [torch.tensor(prompt) for prompt in SEQUENCES]
    for sequence, found in zip(tokens, tapped_states(target, (2, 0, 1), tokens, chunk), strict=True):
        with torch.inference_mode():
            theirs = reference.theirs(sequence.unsqueeze(0), output_hidden_states=True).hidden_states
        expected = torch.cat([theirs[2][0], theirs[0][0], theirs[1][0]], -1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 17, 61])
@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_pages_and_chunks_change_nothing(target: Decoder, tmp_path: Path, kind: str, layout: str, chunk: int) -> None:
    """Both published layouts, against transformers' own modules over whole sequences."""
    theirs = tiny_eagle(target.config, kind)
    head = load_eagle(write_head(theirs, tmp_path, layout), target, ModelDtype.FLOAT32)
    tokens = [torch.tensor(prompt) for prompt in SEQUENCES]
    states = tapped_states(target, head.config.taps, tokens, 61)
    hidden, logits = run_head(head, states, tokens, chunk)
    for sequence, state, ours, found in zip(tokens, states, hidden, logits, strict=True):
        inputs = theirs.modules["fc"](state[:-1]) if kind == "eagle3" else state[:-1]
        expected = theirs.hidden(F.embedding(sequence[1:], target.embedding), inputs)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, expected_logits(theirs, target, expected), rtol=1e-4, atol=1e-3)


def expected_logits(theirs: TinyEagle, target: Decoder, hidden: Tensor) -> Tensor:
    if theirs.kind == "eagle":
        return target.logits(hidden)
    logits: Tensor = theirs.modules["lm_head"](theirs.modules["norm"](hidden))
    return logits


@torch.inference_mode()
def test_drafts_equal_the_unrolled_head_that_is_trained(target: Decoder, tmp_path: Path) -> None:
    """Training must see what serving does: each step's own states and drafts, over the pages of the tokens before."""
    path = write_head(tiny_eagle(target.config), tmp_path, "speculators")
    head = load_eagle(path, target, ModelDtype.FLOAT32)
    trained = trained_like(head, target, path)
    tokens = torch.tensor(PROMPTS[5])
    (states,) = tapped_states(target, head.config.taps, [tokens], 61)
    length = len(tokens) - 1
    unroll, hidden, expected = Unroll(), trained.fuse(states[None, :length]), []
    token_ids = tokens[None, 1:]
    for _ in range(4):
        hidden = trained(token_ids, hidden, unroll)
        expected.append(trained.logits(hidden)[0])
        token_ids = trained.target_ids[expected[-1].argmax(-1)][None]

    for last in (3, 15, 16, 40):
        pages = head.new_kv_pages(len(SEQUENCES) * pages_for(MAX_MODEL_LEN))
        drafted = tokens.clone()
        out, logits = head.forward(step([(0, 0, last + 1)], [tokens[1:]]), head.fuse(states[: last + 1]), pages)
        for depth in range(4):
            torch.testing.assert_close(logits[-1], expected[depth][last], rtol=1e-4, atol=1e-3)
            position = last + depth + 1
            drafted[position + 1] = head.target_ids[logits[-1].argmax()]
            out, logits = head.forward(step([(0, position, position + 1)], [drafted[1:]]), out[-1:], pages)


def trained_like(head: EagleHead, target: Decoder, path: Path) -> DraftModel:
    model = DraftModel(head.config, target.embedding, head.target_ids)
    tensors = load_file(path / "model.safetensors")
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")})
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_frozen_target_is_the_target(tmp_path: Path, name: str) -> None:
    """A head trained on other states than the engine gives drafts badly, and nothing else would say so."""
    with one_thread():
        reference = Reference(tmp_path, name)
        target = FrozenTarget(Checkpoint(tmp_path, CheckpointFormat.FOLDER, "tiny"), torch.device("cpu"), torch.float32)
        lengths = [len(prompt) for prompt in SEQUENCES]
        padded = torch.zeros(len(SEQUENCES), max(lengths), dtype=torch.int64)
        for row, prompt in zip(padded, SEQUENCES, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        states = target.hidden_states(padded, (0, 1))
        logits = target.logits(states.last)
        assert isinstance(reference.ours, Decoder)
        expected = tapped_states(reference.ours, (0, 1), [torch.tensor(prompt) for prompt in SEQUENCES], 61)
    for index, (prompt, length) in enumerate(zip(SEQUENCES, lengths, strict=True)):
        torch.testing.assert_close(logits[index, :length], reference.logits(prompt), rtol=0, atol=2e-4)
        torch.testing.assert_close(states.tapped[index, :length], expected[index], rtol=0, atol=2e-4)
