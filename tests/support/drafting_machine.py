"""A `PageMachine` with a drafter in the same pages, as `quire.engine.gpu.eagle` has one.

The drafter's slot of a token holds a number made of that token and of what the "model" says of all before it, so it is
right only if it was written for this very text. Before it writes, it looks at all that it needs to be there.
"""

from __future__ import annotations

import random

import numpy as np
from page_machine import VOCAB_SIZE, PageMachine, next_token, score

from quire.engine.plan import StepPlan, Work
from quire.service.pages import PAGE_SIZE

_NOTHING = -1


def entry(text: list[int], token_id: int) -> int:
    """What the drafter keeps of `token_id` after `text`."""
    return score(text) * VOCAB_SIZE + int(token_id)


class DraftingMachine(PageMachine):
    """`quality`: how often a draft is right. A page past the last takes what is written nowhere."""

    def __init__(self, num_pages: int, max_num_seqs: int, max_model_len: int) -> None:
        super().__init__(num_pages, max_num_seqs, max_model_len)
        self.drafter_memory = np.full((num_pages + 1, PAGE_SIZE), _NOTHING, dtype=np.int64)
        self.quality = 0.5
        self.num_drafted = 0
        self._random = random.Random(0)

    def draft(self, plan: StepPlan, accepted: dict[int, int]) -> dict[int, tuple[int, ...]]:
        for work in plan.work:
            self.check(work.slot, work.start)
        # Not one sequence after another: those that share pages must not see each other's tokens either way.
        for work in plan.work:
            for position in range(work.start + 1, work.start + work.num_tokens + 1):
                self.write(work.slot, position, entry(self.seen(work.slot, position), self.tokens[work.slot, position]))
        found = {}
        for index, work in enumerate(plan.work):
            if work.sample and work.num_wanted:
                found[index] = self._draft(
                    work, work.start + work.num_tokens - work.num_drafts + accepted.get(index, 0)
                )
        return found

    def _draft(self, work: Work, position: int) -> tuple[int, ...]:
        """`position` is that of the token that was drawn last."""
        self.check(work.slot, position)
        text, drafts = self.tokens[work.slot, : position + 1].tolist(), []
        while len(drafts) < work.num_wanted:
            right = self._random.random() < self.quality
            drafts.append((self.guess([*text, *drafts]) + (not right)) % VOCAB_SIZE)
            page = self.tables[work.slot, (position + len(drafts) - 1) // PAGE_SIZE]
            assert 0 <= page < len(self.memory), "a draft without a page"
            if len(drafts) > 1:
                self.write(work.slot, position + len(drafts) - 1, _NOTHING)
        self.num_drafted += len(drafts)
        self.tokens[work.slot, position + 1 : position + 1 + len(drafts)] = drafts
        return tuple(drafts)

    def guess(self, text: list[int]) -> int:
        """What follows `text`."""
        return next_token(text)

    def check(self, slot: int, last: int) -> None:
        """What the drafter reads: the slots of tokens 1 to `last` of what the slot holds."""
        tokens = self.tokens[slot, : last + 1].tolist()
        for position in range(1, last + 1):
            page = self.tables[slot, position // PAGE_SIZE]
            expected = entry(tokens[:position], tokens[position])
            assert self.drafter_memory[page, position % PAGE_SIZE] == expected, "a slot of another text"

    def write(self, slot: int, position: int, number: int) -> None:
        page = self.tables[slot, position // PAGE_SIZE]
        assert page >= 0, "a slot without a page"
        self.drafter_memory[page, position % PAGE_SIZE] = number
