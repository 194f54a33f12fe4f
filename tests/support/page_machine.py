"""A runner whose "model" can only answer right if every page holds what it should.

It stores token ids in pages as a real one stores keys and values, and draws the next token as a hash of all tokens it
finds through the block table. A page that is shared, freed, reused or filled wrongly changes the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from quire.engine.plan import StepPlan, StepResult
from quire.engine.runner import DeviceInfo, StepMasks
from quire.engine.sequence import pages_for
from quire.service.pages import PAGE_SIZE

VOCAB_SIZE = 197
EOS = 3


def next_token(token_ids: list[int]) -> int:
    """What the "model" says after `token_ids`."""
    digest = blake2b(np.asarray(token_ids, dtype="<u4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VOCAB_SIZE


def run_alone(prompt: list[int], max_tokens: int, max_model_len: int, stop: tuple[int, ...] = ()) -> list[int]:
    """The output of a request that has the engine to itself, written out without one."""
    tokens = list(prompt)
    while True:
        tokens.append(next_token(tokens))
        output = tokens[len(prompt) :]
        if tokens[-1] == EOS or tokens[-1] in stop or len(output) >= max_tokens or len(tokens) >= max_model_len:
            return output


@dataclass(frozen=True)
class Done:
    result: StepResult

    def wait(self) -> StepResult:
        return self.result


class PageMachine:
    """Satisfies `quire.engine.runner.Runner`."""

    def __init__(self, num_pages: int, max_num_seqs: int, max_model_len: int) -> None:
        self.info = DeviceInfo("pages", "int", 1)
        self.memory = np.full((num_pages, PAGE_SIZE), -1, dtype=np.int64)
        self.tables = np.full((max_num_seqs, pages_for(max_model_len)), -1, dtype=np.int64)
        self.tokens = np.full((max_num_seqs, max_model_len + 1), -1, dtype=np.int64)

    def launch(self, plan: StepPlan, masks: StepMasks | None) -> Done:
        for admission in plan.admissions:
            self.tables[admission.slot] = -1
            self.tokens[admission.slot] = -1
            self.tokens[admission.slot, : len(admission.token_ids)] = admission.token_ids
        for grant in plan.grants:
            self.tables[grant.slot, grant.first : grant.first + len(grant.pages)] = grant.pages
        for work in plan.work:
            assert work.num_tokens > 0, "work without tokens"
            for position in range(work.start, work.start + work.num_tokens):
                page = self.tables[work.slot, position // PAGE_SIZE]
                assert page >= 0, "a token without a page"
                self.memory[page, position % PAGE_SIZE] = self.tokens[work.slot, position]
        drawn = []
        for work in plan.work:
            if not work.sample:
                drawn.append(-1)
                continue
            length = work.start + work.num_tokens
            seen = [int(self.memory[self.tables[work.slot, i // PAGE_SIZE], i % PAGE_SIZE]) for i in range(length)]
            token = next_token(seen)
            self.tokens[work.slot, length] = token
            drawn.append(token)
        return Done(StepResult(tuple(drawn)))
