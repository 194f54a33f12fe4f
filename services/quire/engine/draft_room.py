"""Room for drafts: tokens of a step and pages that nobody else has a use for.

The scheduler asks. Drafts ride on a sequence's next token, so nobody waits or is preempted for them. A drafter in the
pages is a slot ahead of the model, and more where it drafts: its slots get pages that are left over, and those are the
first to be taken back.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from quire.engine.page_pool import PagePool
from quire.engine.schedule import ScheduleBuilder
from quire.engine.sequence import Sequence, pages_for
from quire.service.pages import PAGE_SIZE

# Whether a running sequence is left out of a step.
IsPutOff = Callable[[Sequence], bool]


class DraftRoom:
    """For the drafts of a step, at most `max_tokens` if it is given; `in_pages`: there is a drafter in the pages."""

    def __init__(self, pool: PagePool, max_tokens: int | None, *, in_pages: bool) -> None:
        self._pool, self._max_tokens, self._in_pages = pool, max_tokens, in_pages

    def limit(self, running: SequenceOf[Sequence], drafted: SequenceOf[Sequence], budget: int, most: int) -> int:
        """Cuts the drafts of those that are `drafted` for to what costs nobody else anything, in a step of `budget`
        tokens without them, and `most` with them. Returns how many are left."""
        spare_tokens = most - len(running)
        if self._max_tokens is not None:
            spare_tokens = min(spare_tokens, self._max_tokens)
        if sum(sequence.num_verified for sequence in drafted) > spare_tokens:
            # One sequence's second choices are worth less than another's drafts.
            for sequence in drafted:
                sequence.siblings = ()
        spare_pages, num_left = self._pool.available, 0
        for sequence in running:
            num_tokens = sequence.reach + 1
            if (num_pending := sequence.num_pending) > 1:
                num_tokens += min(num_pending, budget) - 1
            if num_tokens > (held := len(sequence.block_table)) * PAGE_SIZE:
                spare_pages -= pages_for(num_tokens) - held
        for sequence in drafted:
            reach, count, held = sequence.reach, sequence.num_verified, len(sequence.block_table)
            # One token is drawn after the drafts, within the output's length; the one before is computed with them.
            left = sequence.max_tokens - sequence.num_tokens - sequence.num_open
            limit = min(left - 1, spare_tokens) if sequence.num_pending == 1 else 0
            if limit < count or spare_pages < 0 or reach + 1 + count > held * PAGE_SIZE:
                own_pages = pages_for(reach + 1)
                if spare_pages >= 0:  # else what it has beyond that may be taken back
                    own_pages = max(held, own_pages)
                room = (own_pages + max(0, spare_pages)) * PAGE_SIZE - reach
                count = max(0, min(limit, room - 1, count))
                sequence.drafts = sequence.drafts[:count]
                sequence.siblings = sequence.siblings[: count - len(sequence.drafts)]
                if count:
                    spare_pages -= max(0, pages_for(reach + 1 + count) - own_pages)
            spare_tokens -= count
            num_left += count
        return num_left

    def step_back(self, sequence: Sequence) -> None:
        """Where the drafter's slot of the next token has no page it is not written: it will be with the last token."""
        if 0 < sequence.num_computed == len(sequence.block_table) * PAGE_SIZE:
            sequence.num_computed -= 1

    def look_ahead(self, step: ScheduleBuilder) -> None:
        """Gives the step's sequences slots beyond their tokens, one and as many as drafts are wanted, if pages are left
        over, and cuts what is wanted to that."""
        for sequence, work in step.work.items():
            end, first = work.start + work.num_open + work.num_tokens, len(sequence.block_table)
            wanted = work.num_wanted
            if not wanted and end < first * PAGE_SIZE:
                continue
            if wanted > sequence.max_tokens - end:
                wanted = max(0, sequence.max_tokens - end)
            if end + (wanted or 1) > first * PAGE_SIZE:
                missing = pages_for(end + (wanted or 1)) - first
                pages = self._pool.allocate(min(missing, self._pool.available))
                sequence.block_table.extend(pages)
                wanted = min(wanted, len(sequence.block_table) * PAGE_SIZE - end)
                # The slot behind the last token is written in any case: where nobody reads, if it has no page.
                if end == len(sequence.block_table) * PAGE_SIZE:
                    pages.append(self._pool.num_pages)
                if pages:
                    step.extend(sequence, first, tuple(pages))
            if wanted != work.num_wanted:
                step.work[sequence] = work._replace(num_wanted=wanted)

    def take_back(
        self, running: SequenceOf[Sequence], claimant: Sequence, step: ScheduleBuilder, is_put_off: IsPutOff
    ) -> bool:
        """Frees the pages that only the drafter has a use for; returns whether there were any."""
        if not self._in_pages:
            return False
        before = self._pool.available
        for sequence in running:
            if sequence is claimant:
                continue
            work, num_tokens = step.work.get(sequence), 0
            if work is not None:
                num_tokens = work.num_tokens
            elif sequence.num_pending == 1 and not is_put_off(sequence):
                num_tokens = 1
            self.keep(sequence, sequence.reach + num_tokens)
        return self._pool.available > before

    def keep(self, sequence: Sequence, num_tokens: int) -> None:
        """Frees the pages that a sequence has beyond those of its first `num_tokens` tokens."""
        if num_tokens <= (len(sequence.block_table) - 1) * PAGE_SIZE:
            num_pages = pages_for(num_tokens)
            self._pool.release(sequence.block_table[num_pages:])
            del sequence.block_table[num_pages:]
