"""A runner whose "model" can only answer right if every page holds what it should.

It stores token ids in pages as a real one stores keys and values, and draws the next token as a hash of all tokens it
finds through the block table. A page that is shared, freed, reused or filled wrongly changes the output. Grammars are
as true: a mask comes from the output that the source was told of, so one that lags behind changes the output, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np

from quire.engine.masks import DraftResult, MaskBatch, MaskRequest, first_rows
from quire.engine.plan import StepPlan, StepResult, Work
from quire.engine.runner import DeviceInfo, StepMasks
from quire.engine.sequence import pages_for
from quire.service.errors import InvalidRequestError, QuireError
from quire.service.pages import PAGE_SIZE
from quire.service.request import Request, TokenLogprobs

VOCAB_SIZE = 197
EOS = 3


def next_token(token_ids: Sequence[int], allowed: Sequence[int] = range(VOCAB_SIZE)) -> int:
    """What the "model" says after `token_ids`, of what is allowed."""
    return allowed[score(token_ids) % len(allowed)]


def score(token_ids: Sequence[int]) -> int:
    """A number that depends on every one of `token_ids`."""
    return int.from_bytes(blake2b(np.asarray(token_ids, dtype="<u4").tobytes(), digest_size=6).digest(), "little")


def allowed_after(output: Sequence[int]) -> list[int] | None:
    """The "grammar": a few tokens that depend on all of `output`; None where it is broken."""
    start = score([7, *output])
    if start % 64 == 0:
        return None
    return sorted({(start + 5 * i) % VOCAB_SIZE for i in range(1 + start % 9)})


def run_alone(request: Request, max_model_len: int) -> tuple[list[int], bool]:
    """The output of a request that has the engine to itself, written out without one; and whether its grammar broke."""
    tokens, stop = list(request.prompt_token_ids), request.stop
    ends = {*stop.stop_token_ids, *(() if stop.ignore_eos else (EOS,))}
    output: list[int] = []
    while True:
        allowed = range(VOCAB_SIZE) if request.constraint is None else allowed_after(output)
        if allowed is None:
            return output, True
        output.append(next_token([*tokens, *output], allowed))
        if output[-1] in ends or len(output) >= stop.max_tokens or len(tokens) + len(output) >= max_model_len:
            return output, False


@dataclass(frozen=True)
class Grammar:
    """`quire.engine.masks.MaskSource`: keeps what it was told of each sequence, as a real one keeps its state."""

    told: dict[int, list[int]]

    def begin(self, requests: Sequence[MaskRequest], released: Sequence[int]) -> Masks:
        for sequence in released:
            self.told.pop(sequence, None)
        count = sum(1 + len(request.drafts) for request in requests)
        rows = np.zeros((count, -(-VOCAB_SIZE // 32)), dtype=np.uint32)
        errors: dict[int, QuireError] = {}
        results: dict[int, DraftResult] = {}
        for row, request in zip(first_rows(requests), requests, strict=True):
            told, output = self.told.setdefault(request.sequence, []), list(request.outputs(0))
            assert output[: len(told)] == told, "a grammar can't take tokens back"
            told[:] = output
            allowed = allowed_after(output)
            if allowed is None:
                errors[request.sequence] = InvalidRequestError("the grammar is broken", field="constraint")
            self._allow(rows[row], allowed)
            kept = 0
            for draft in request.drafts:
                # A draft after which the grammar is broken is no better than one that it forbids.
                if allowed is None or draft not in allowed or allowed_after([*output, draft]) is None:
                    break
                kept += 1
                output.append(draft)
                allowed = allowed_after(output)
                self._allow(rows[row + kept], allowed)
            results[request.sequence] = DraftResult(kept, self._forced(output, request.max_forced))
        return Masks(MaskBatch(rows, errors, results))

    def _allow(self, row: np.ndarray, allowed: list[int] | None) -> None:
        for token in range(VOCAB_SIZE) if allowed is None else allowed:
            row[token // 32] |= np.uint32(1 << token % 32)

    def _forced(self, output: list[int], most: int) -> tuple[int, ...]:
        forced: list[int] = []
        while len(forced) < most and (allowed := allowed_after([*output, *forced])) is not None and len(allowed) == 1:
            forced.append(allowed[0])
        return tuple(forced)

    def close(self) -> None:
        """Holds nothing."""


@dataclass(frozen=True)
class Masks:
    """They are there at once."""

    batch: MaskBatch

    def arrives(self, seconds: float) -> bool:
        return True

    def wait(self) -> MaskBatch:
        return self.batch


@dataclass
class Launched:
    """Pages are written; tokens are drawn, too, unless the step's masks are still to come."""

    machine: PageMachine
    plan: StepPlan
    scores: dict[int, tuple[TokenLogprobs, ...]]
    result: StepResult | None = None

    def draw(self, masks: StepMasks | None) -> None:
        assert self.machine.waiting is self, "a step was launched before the one before it had drawn its tokens"
        self.machine.waiting = None
        token_ids, accepted = self.machine.draw(self.plan, masks)
        drafts = self.machine.draft(self.plan, accepted)
        self.result = StepResult(token_ids, {}, self.scores, accepted, drafts)

    def wait(self) -> StepResult:
        assert self.result is not None, "the masks never came"
        return self.result


class PageMachine:
    """Satisfies `quire.engine.runner.Runner`."""

    def __init__(self, num_pages: int, max_num_seqs: int, max_model_len: int) -> None:
        self.info = DeviceInfo("pages", "int", 1)
        self.memory = np.full((num_pages, PAGE_SIZE), -1, dtype=np.int64)
        self.tables = np.full((max_num_seqs, pages_for(max_model_len)), -1, dtype=np.int64)
        self.tokens = np.full((max_num_seqs, max_model_len + 1), -1, dtype=np.int64)
        self.num_prompt_tokens = [0] * max_num_seqs
        self.kept = [0] * max_num_seqs
        self.waiting: Launched | None = None

    def launch(self, plan: StepPlan, *, masked: bool) -> Launched:
        assert self.waiting is None, "a step was launched before the one before it had drawn its tokens"
        for admission in plan.admissions:
            self.tables[admission.slot] = -1
            self.tokens[admission.slot] = -1
            self.num_prompt_tokens[admission.slot] = admission.num_prompt_tokens
            self.tokens[admission.slot, : len(admission.token_ids)] = admission.token_ids
        for grant in plan.grants:
            self.tables[grant.slot, grant.first : grant.first + len(grant.pages)] = grant.pages
        for drafts in plan.drafts:
            self.tokens[drafts.slot, drafts.position : drafts.position + len(drafts.token_ids)] = drafts.token_ids
        plan = replace(plan, work=tuple(self.follow(work) for work in plan.work))
        for work in plan.work:
            assert work.num_tokens > work.num_drafts, "work without tokens"
            for position in range(work.start, work.start + work.num_tokens):
                page = self.tables[work.slot, position // PAGE_SIZE]
                assert page >= 0, "a token without a page"
                self.memory[page, position % PAGE_SIZE] = self.tokens[work.slot, position]
        scores = {index: tuple(self.score_prompt(work)) for index, work in enumerate(plan.work) if work.score}
        self.waiting = launched = Launched(self, plan, scores)
        if not masked:
            launched.draw(None)
        return launched

    def follow(self, work: Work) -> Work:
        """`work` with the start that the host could not know."""
        if not work.num_open:
            return work
        assert 0 <= self.kept[work.slot] <= work.num_open
        return work._replace(start=work.start + self.kept[work.slot])

    def prepare(self) -> bool:
        return False

    def close(self) -> None:
        """Holds nothing."""

    def draw(self, plan: StepPlan, masks: StepMasks | None) -> tuple[tuple[int, ...], dict[int, int]]:
        """What each of the plan's work draws last, the next step's input, and how many drafts it keeps."""
        allowed: dict[int, list[list[int]]] = {}
        if masks is not None:
            bits = iter(np.unpackbits(masks.batch.rows.view(np.uint8), axis=1, bitorder="little"))
            for index in masks.work:
                allowed[index] = [np.flatnonzero(next(bits)).tolist() for _ in range(1 + plan.work[index].num_drafts)]
        drawn, accepted = [-1] * len(plan.work), {}
        for index, work in enumerate(plan.work):
            if not work.sample:
                continue
            choices: list[Sequence[int]] = [*allowed.get(index, [range(VOCAB_SIZE)] * (1 + work.num_drafts))]
            first = work.start + work.num_tokens - work.num_drafts
            for kept in range(1 + work.num_drafts):
                position = first + kept
                drawn[index] = next_token(self.seen(work.slot, position), choices[kept] or range(VOCAB_SIZE))
                drafted, self.tokens[work.slot, position] = self.tokens[work.slot, position], drawn[index]
                if drawn[index] != drafted:
                    break
            if work.num_drafts:
                self.kept[work.slot] = accepted[index] = kept
        return tuple(drawn), accepted

    def draft(self, plan: StepPlan, accepted: dict[int, int]) -> dict[int, tuple[int, ...]]:
        """What may come after what was drawn: a machine with a drafter says it."""
        return {}

    def seen(self, slot: int, length: int) -> list[int]:
        """The first `length` tokens as the slot's pages hold them."""
        return [int(self.memory[self.tables[slot, i // PAGE_SIZE], i % PAGE_SIZE]) for i in range(length)]

    def score_prompt(self, work: Work) -> list[TokenLogprobs]:
        """Of each prompt token that the work's tokens predict: a number made of all before it."""
        end = min(work.start + work.num_tokens, self.num_prompt_tokens[work.slot] - 1)
        return [TokenLogprobs(-score(self.seen(work.slot, i)), 1) for i in range(work.start + 1, end + 1)]
