"""A head's drafts over a batch's slots: the same as for one text alone, whatever steps brought it there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from families import one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_eagle import tiny_eagle, write_head
from tiny_models import tiny_llama
from torch import Tensor

import quire.engine.speculation.eagle.drafter as drafter_module
from quire.engine.models.model import ForwardBatch, ModelDtype
from quire.engine.models.registry import load_model
from quire.engine.speculation.eagle.drafter import EagleDrafter, Progress
from quire.engine.speculation.eagle.head import EagleHead, load_eagle
from quire.service.checkpoint.locate import CheckpointFormat
from quire.service.pages import PAGE_SIZE

CONTEXT, PROMPT, LENGTH = 64, 24, 200


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EagleHead]:
    with one_thread():
        folder = tmp_path_factory.mktemp("model")
        tiny_llama(folder)
        target = load_model(folder, CheckpointFormat.FOLDER, ModelDtype.FLOAT32, lambda *_: None)
        path = write_head(tiny_eagle(target.config), tmp_path_factory.mktemp("head"), "safeail")
        patch = pytest.MonkeyPatch()
        patch.setattr(drafter_module, "_CONTEXT", CONTEXT)
        patch.setattr(drafter_module, "_PROMPT", PROMPT)
        yield load_eagle(path, target, ModelDtype.FLOAT32)
        patch.undo()


@dataclass
class Text:
    """One slot's: what the target says of each position, and how far the drafter may have read."""

    tokens: Tensor
    states: Tensor
    first: int = 0  # the oldest token that the head still sees
    length: int = 0  # computed by the target


def alone(head: EagleHead, text: Text, num_drafts: int) -> tuple[int, ...]:
    """The drafts after the text's tokens, computed at once, in pages of its own."""
    pages = head.new_kv_pages(LENGTH // PAGE_SIZE + 4)

    def run(tokens: Tensor, hidden: Tensor, first: int) -> tuple[Tensor, int]:
        positions = torch.arange(first, first + len(tokens))
        places = positions - text.first
        batch = ForwardBatch(
            tokens, positions, places, torch.tensor([0, len(tokens)], dtype=torch.int32),
            torch.tensor([int(places[-1]) + 1], dtype=torch.int32), torch.arange(len(pages), dtype=torch.int32)[None],
            torch.tensor([len(tokens) - 1]), len(tokens), int(places[-1]) + 1,
        )  # fmt: skip
        out, logits = head.forward(batch, hidden, pages)
        return out[-1:], int(head.target_ids[logits.argmax()])

    seen = slice(text.first, text.length)
    hidden, draft = run(text.tokens[text.first + 1 : text.length + 1], head.fuse(text.states[seen]), text.first)
    drafts = [draft]
    while len(drafts) < num_drafts:
        hidden, draft = run(torch.tensor([draft]), hidden, text.length + len(drafts) - 1)
        drafts.append(draft)
    return tuple(drafts)


@dataclass(frozen=True)
class Part:
    """What a step does in one slot: `count` tokens are right, `wanted` drafts follow."""

    kind: str
    count: int
    wanted: int


def step(drafter: EagleDrafter, head: EagleHead, texts: list[Text], token_ids: np.ndarray, parts: list[Part]) -> None:
    rows, slots, starts, counts, firsts, wanted = [], [], [], [], [], []
    for slot, (text, part) in enumerate(zip(texts, parts, strict=True)):
        if part.kind == "new":
            drafter.admit(slot)
            text.first = text.length
        if part.kind == "absent" or text.length + part.count > LENGTH - 10:
            continue
        stop = text.length + part.count
        if part.kind == "pause":
            text.first = text.length = stop
            continue
        # Rows of drafts that were wrong stand behind those that count.
        firsts.append(sum(len(one) for one in rows))
        rows.append(torch.cat((text.states[text.length : stop], torch.full((2, text.states.shape[1]), 9.0))))
        slots.append(slot)
        starts.append(text.length)
        counts.append(part.count)
        wanted.append(part.wanted)
    if not slots:
        return
    progress = Progress(*(np.array(column, dtype=np.int64) for column in (slots, starts, counts, firsts, wanted)))
    drafts = drafter.draft(progress, torch.cat(rows), token_ids)
    for slot, count, number, found in zip(slots, counts, wanted, drafts, strict=True):
        text = texts[slot]
        if text.first == text.length or count > PROMPT:
            text.first = text.length + max(0, count - PROMPT)
        if text.length - text.first + min(count, PROMPT) + number > CONTEXT and text.first < text.length:
            text.first += min(CONTEXT // 2, text.length - text.first)
        text.length += count
        assert found == alone(head, text, number)


def fresh(head: EagleHead, num_slots: int, seed: int) -> tuple[EagleDrafter, list[Text], np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    size = head.config.target_hidden_size * len(head.config.taps)
    texts = [
        Text(torch.randint(0, 200, (LENGTH + 1,), generator=generator), torch.randn(LENGTH, size, generator=generator))
        for _ in range(num_slots)
    ]
    return EagleDrafter(head, num_slots), texts, torch.stack([text.tokens for text in texts]).numpy()


PARTS = st.builds(
    Part, st.sampled_from(["draft", "draft", "draft", "pause", "absent", "new"]), st.integers(1, 40), st.integers(1, 5)
)


@given(num_slots=st.integers(1, 3), seed=st.integers(0, 99), data=st.data())
@settings(deadline=None, max_examples=60)
def test_drafts_are_those_of_the_text_alone(head: EagleHead, num_slots: int, seed: int, data: st.DataObject) -> None:
    """Another slot's keys, a draft's that was wrong, or those of before a pause would make drafts worse, unseen."""
    with torch.inference_mode():
        drafter, texts, token_ids = fresh(head, num_slots, seed)
        for _ in range(data.draw(st.integers(1, 12), label="steps")):
            step(drafter, head, texts, token_ids, [data.draw(PARTS) for _ in texts])


def test_the_oldest_tokens_make_room(head: EagleHead) -> None:
    """A long answer fills a slot's pages many times: what is left must stay in its places."""
    with torch.inference_mode():
        drafter, texts, token_ids = fresh(head, 2, 1)
        for number in range(25):
            step(drafter, head, texts, token_ids, [Part("draft", 7, 3), Part("draft", 1 + number % 5, 4)])
        assert all(text.first > 0 for text in texts)
