"""A step: what the device is told and which sequences it is about, and how the scheduler puts it together."""

from __future__ import annotations

from dataclasses import dataclass

from quire.engine.plan import Admission, Drafts, PageGrant, StepPlan, Work
from quire.engine.sequence import UNKNOWN, Sequence
from quire.engine.speculation.drafts import Drafter
from quire.service.pages import PAGE_SIZE


@dataclass(slots=True)
class InFlightDrafts:
    """Drafts of one sequence that a step verifies; `token_ids` are UNKNOWN until the step before is read."""

    drafter: Drafter | None
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A step: the plan for the device, and for the host the sequences of `plan.work`, in the same order, and those that
    verify drafts."""

    plan: StepPlan
    sequences: tuple[Sequence, ...]
    started: tuple[tuple[Sequence, int], ...]  # scheduled for the first time, with their cached prompt tokens
    drafts: dict[Sequence, InFlightDrafts]


class ScheduleBuilder:
    """A schedule in the making: `budget` tokens are left, `work` is what each sequence is to do."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._admissions: dict[Sequence, Admission] = {}
        self._grants: dict[Sequence, PageGrant] = {}
        self.work: dict[Sequence, Work] = {}
        self._drafts: dict[Sequence, Drafts] = {}
        self._verified: dict[Sequence, InFlightDrafts] = {}
        self._started: list[tuple[Sequence, int]] = []
        self._computing: set[bytes] = set()
        self._num_looked_at = 0

    def computes(self, page_hash: bytes) -> bool:
        """Whether what was added so far fills the page with this hash."""
        # Only newcomers ask, so most steps never look at their work this way.
        for sequence, work in list(self.work.items())[self._num_looked_at :]:
            end = (work.start + work.num_tokens) // PAGE_SIZE
            self._computing.update(sequence.page_hashes[sequence.num_published : end])
        self._num_looked_at = len(self.work)
        return page_hash in self._computing

    def admit(self, sequence: Sequence, grant: PageGrant) -> None:
        """A waiting sequence joins with `grant` as its whole block table."""
        request = sequence.request
        self._admissions[sequence] = Admission(
            sequence.slot,
            tuple(sequence.token_ids),
            sequence.num_prompt_tokens,
            request.sampling,
            tuple(sequence.end_token_ids),
            request.stop.min_tokens,
            request.logprobs,
            request.prompt_logprobs,
        )
        self._grants[sequence] = grant
        if not sequence.started:
            sequence.started = True
            self._started.append((sequence, min(sequence.num_computed, sequence.num_prompt_tokens)))

    def add(self, sequence: Sequence, num_tokens: int, grant: PageGrant | None = None) -> None:
        """A sequence in the batch computes `num_tokens`."""
        self.budget -= num_tokens
        start = sequence.num_computed
        drafts, siblings, num_open = sequence.drafts, sequence.siblings, sequence.num_open
        num_verified = len(drafts) + len(siblings)
        sample = start + num_tokens == sequence.num_tokens + num_verified
        # The last row of a prompt is about the first output token.
        score = start + 1 < sequence.num_prompt_tokens and sequence.scores_prompt
        wanted = sequence.num_wanted if sample else 0
        self.work[sequence] = Work(
            sequence.slot, start, num_tokens, sample, score, len(drafts), wanted, num_open, len(siblings)
        )
        if drafts:
            self._verified[sequence] = InFlightDrafts(sequence.drafter, drafts)
            if drafts[0] != UNKNOWN:
                first = start + num_tokens - num_verified
                self._drafts[sequence] = Drafts(sequence.slot, first, drafts, siblings)
        if grant is not None:
            self._grants[sequence] = grant

    def extend(self, sequence: Sequence, first: int, pages: tuple[int, ...]) -> None:
        """Grants more pages, which become entries `first` and on of the sequence's block table."""
        if (grant := self._grants.get(sequence)) is not None:
            first, pages = grant.first, grant.pages + pages
        self._grants[sequence] = PageGrant(sequence.slot, first, pages)

    def remove(self, sequence: Sequence) -> None:
        """Takes back what `add` decided for a sequence that is preempted later in the same step."""
        work = self.work.pop(sequence, None)
        if work is not None:
            self.budget += work.num_tokens
        self._grants.pop(sequence, None)
        self._drafts.pop(sequence, None)
        self._verified.pop(sequence, None)

    def schedule(self) -> Schedule:
        plan = StepPlan(
            tuple(self._admissions.values()),
            tuple(self._grants.values()),
            tuple(self.work.values()),
            tuple(self._drafts.values()),
        )
        return Schedule(plan, tuple(self.work), tuple(self._started), self._verified)
