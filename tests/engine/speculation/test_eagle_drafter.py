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
        yield load_eagle(path, target, ModelDtype.FLOAT32)


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


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_drafts_are_those_of_the_text_alone(head: EagleHead, data: st.DataObject) -> None:
    """Another slot's keys, a draft's that was wrong, or those of before a pause would make drafts worse, unseen."""
    patch = pytest.MonkeyPatch()
    patch.setattr(drafter_module, "_CONTEXT", CONTEXT)
    patch.setattr(drafter_module, "_PROMPT", PROMPT)
    num_slots = data.draw(st.integers(1, 3))
    size = head.config.target_hidden_size * len(head.config.taps)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    with torch.inference_mode():
        drafter = EagleDrafter(head, num_slots)
        texts: list[Text] = []
        for _ in range(num_slots):
            tokens = torch.randint(0, 200, (LENGTH + 1,), generator=generator)
            texts.append(Text(tokens, torch.randn(LENGTH, size, generator=generator)))
        token_ids = torch.stack([text.tokens for text in texts]).numpy()
        for _ in range(data.draw(st.integers(1, 12), label="steps")):
            step(drafter, head, texts, token_ids, data)
    patch.undo()


def step(drafter: EagleDrafter, head: EagleHead, texts: list[Text], token_ids: np.ndarray, data: st.DataObject) -> None:
    kinds = [data.draw(st.sampled_from(["draft", "draft", "draft", "pause", "absent", "new"])) for _ in texts]
    rows, slots, starts, counts, firsts, wanted = [], [], [], [], [], []
    for slot, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        if kind == "new":
            drafter.admit(slot)
            text.first = text.length
        # A prompt, or what one step accepts.
        count = data.draw(st.integers(1, 40 if text.length == text.first else 5))
        if kind == "absent" or text.length + count > LENGTH - 10:
            continue
        if kind == "pause":
            text.length += count
            text.first = text.length
            continue
        # Rows of drafts that were wrong stand behind those that count.
        firsts.append(sum(len(part) for part in rows))
        rows.append(
            torch.cat((text.states[text.length : text.length + count], torch.full((2, text.states.shape[1]), 9.0)))
        )
        slots.append(slot)
        starts.append(text.length)
        counts.append(count)
        wanted.append(data.draw(st.integers(1, 5)))
    if not slots:
        return
    progress = Progress(*(np.array(column, dtype=np.int64) for column in (slots, starts, counts, firsts, wanted)))
    drafts = drafter.draft(progress, torch.cat(rows), token_ids)
    for slot, count, number, found in zip(slots, counts, wanted, drafts, strict=True):
        text = texts[slot]
        if text.first == text.length:
            text.first = text.length + max(0, count - PROMPT)
        if text.length - text.first + min(count, PROMPT) + number > CONTEXT and text.first < text.length:
            text.first += min(CONTEXT // 2, text.length - text.first)
        text.length += count
        assert found == alone(head, text, number)
