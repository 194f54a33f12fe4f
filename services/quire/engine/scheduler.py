"""One scheduler for all tokens: prefill chunks and decodes share a step under one token budget.

Called by the core: `schedule()` decides a step and books it as done, `append()` adds what it drew. Between the two a
token is known to exist but not its value, which is all that the next step's plan needs: so the core may be a step ahead
of the device. The scheduler owns the host's state (sequences, pages, slots) and knows nothing of tensors.

A step in flight may still write to pages, and to a slot, that were given back meanwhile: whoever gets them next is in
a later step, and steps run in their order.

- Sequences that decode go first, so a long prompt never stalls them; prompts fill the rest of the budget in chunks.
  While most of the batch decodes, smaller chunks ride on more steps (Sarathi-Serve: Agrawal et al., OSDI 2024): steps
  of a few hundred tokens leave a GPU's arithmetic idle, and each gets its share of what would fill it.
- Waiting sequences join in order (priority, then arrival) and the first that does not fit stops the rest: a long
  prompt can't be starved by short ones behind it.
- A waiting sequence whose next page is being computed in this very step waits for it: prompts that begin alike and
  arrive together are computed once.
- Drafts ride on a sequence's next token where budget and pages are left over: nobody waits or is preempted for them.
- A drafter in the pages is a slot ahead of the model, and more where it drafts: it gets pages that are left over, and
  they are the first to be taken back. Who has none drafts less, and computes its last token again with the next one.
- When pages run out, the running sequence that loses least computed work among those of the lowest priority gives
  its own back and waits for its old place. The one with most work is therefore never chosen while there is another:
  every full cache still makes progress.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import count

from quire.engine.draft_room import DraftRoom
from quire.engine.page_pool import PagePool
from quire.engine.plan import PageGrant
from quire.engine.schedule import Schedule, ScheduleBuilder
from quire.engine.sequence import Sequence, SequenceState, pages_for
from quire.service.errors import ConfigError, InvalidRequestError, OverloadedError
from quire.service.pages import PAGE_SIZE
from quire.service.request import Request


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The limits of a batch. Lengths and budgets are in tokens.

    `max_mixed_tokens` is the budget of a step, its drafts apart, while at least half of the batch decodes, if that
    leaves room for as many prompt tokens as there are decodes; 0 is no such limit. `max_draft_tokens` is how many
    drafts of all sequences may be verified in a step; None is no limit of its own. `drafter_in_pages`: a drafter on the
    device has keys and values of its own in the pages: see `quire.engine.gpu.eagle`.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int = 8192
    max_waiting: int = 1024
    enable_prefix_caching: bool = True
    max_mixed_tokens: int = 0
    max_draft_tokens: int | None = None
    drafter_in_pages: bool = False

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1", field=name)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}: "
                "raise it, so that a full batch can decode in one step",
                field="max_num_batched_tokens",
            )


class Scheduler:
    """Decides which sequence computes how many tokens in each step."""

    def __init__(self, config: SchedulerConfig, pool: PagePool, eos_token_ids: frozenset[int]) -> None:
        if pages_for(config.max_model_len) > pool.num_pages:
            raise ConfigError(
                f"{pool.num_pages} pages hold {pool.num_pages * PAGE_SIZE} tokens, less than max_model_len "
                f"{config.max_model_len}: raise num_pages or lower max_model_len",
                field="num_pages",
            )
        self.config = config
        self.pool = pool
        self._drafts = DraftRoom(pool, config.max_draft_tokens, in_pages=config.drafter_in_pages)
        self.num_preemptions = 0
        # While no masks come, sequences that need them are left out of steps, so that the others go on.
        self.hold_constrained = False
        self._eos_token_ids = eos_token_ids
        self._arrivals = count()
        self._sequences: dict[int, Sequence] = {}
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # a heap; entries of ended sequences are stale
        self._num_waiting = 0
        # How many drafts the device is to make of what follows the prompts that join.
        self.num_wanted = 0
        self._running: list[Sequence] = []
        self._slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._deadlines: list[tuple[int, int]] = []  # a heap of (unix ms, key); entries of ended sequences are stale

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def running(self) -> SequenceOf[Sequence]:
        """They, in the order in which they joined."""
        return self._running

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot, preempted ones included."""
        return self._num_waiting

    @property
    def num_pending_prefill_tokens(self) -> int:
        """Prompt tokens still to be computed, of waiting and running sequences."""
        return sum(sequence.num_pending for sequence in self._sequences.values() if sequence.num_pending > 1)

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences that have not ended."""
        return iter(self._sequences.values())

    def get(self, key: int) -> Sequence | None:
        """The sequence under `key`, if it has not ended."""
        return self._sequences.get(key)

    def add(self, key: int, request: Request) -> Sequence:
        """Queues a request; raises InvalidRequestError if it can never run, OverloadedError if the queue is full."""
        if key in self._sequences:
            raise InvalidRequestError(f"key {key} is in use: choose another", field="key")
        num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        if num_tokens >= self.config.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {num_tokens} tokens and the model's context {self.config.max_model_len}: "
                "shorten it so that at least one token can follow",
                field="prompt_token_ids",
            )
        if len(request.output_token_ids) >= request.stop.max_tokens:
            raise InvalidRequestError(
                f"output_token_ids already holds {len(request.output_token_ids)} of max_tokens "
                f"{request.stop.max_tokens}: nothing is left to generate",
                field="output_token_ids",
            )
        if self._num_waiting >= self.config.max_waiting:
            raise OverloadedError(f"{self._num_waiting} requests are waiting already: try again later")
        sequence = Sequence(key, request, next(self._arrivals), self._eos_token_ids, self.config.max_model_len)
        self._sequences[key] = sequence
        self._wait(sequence)
        if request.deadline_unix_ms is not None:
            heapq.heappush(self._deadlines, (request.deadline_unix_ms, key))
        return sequence

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence and gives back all that it holds."""
        if sequence.state is SequenceState.RUNNING:
            self._leave_batch(sequence)
        else:
            self._num_waiting -= 1
        sequence.state = SequenceState.FINISHED
        del self._sequences[sequence.key]

    def expired(self, now_ms: int) -> list[Sequence]:
        """Sequences whose deadline has passed, each told once."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            sequence = self._sequences.get(heapq.heappop(self._deadlines)[1])
            if sequence is not None:
                expired.append(sequence)
        return expired

    def schedule(self) -> Schedule:
        """The next step, which is to be launched; its plan has no work if there is nothing to do."""
        num_decodes = 0
        if self.config.max_mixed_tokens:
            num_decodes = sum(1 for sequence in self._running if sequence.num_pending == 1)
        step = ScheduleBuilder(self._budget(num_decodes))
        preempted = self._schedule_running(step)
        # Pages that a preemption freed belong to those who needed them, not to newcomers who would need more soon.
        if not preempted:
            self._schedule_waiting(step)
        if self.config.drafter_in_pages:
            self._drafts.look_ahead(step)
        schedule = step.schedule()
        self._book(schedule)
        return schedule

    def size_without_drafts(self, num_decodes: int, num_prompt: int) -> int:
        """About how many tokens the next step has without drafts: so many sequences decode, and the prompts of others
        that run have `num_prompt` left. One that waits joins them if there is a slot."""
        if self._waiting and self._slots:
            num_prompt += self._waiting[0][1].num_pending
        return min(self._budget(num_decodes), num_decodes + num_prompt)

    def _budget(self, num_decodes: int) -> int:
        """Tokens of a step, its drafts apart if there is a limit while most of the batch decodes."""
        config = self.config
        if config.max_mixed_tokens == 0 or 2 * num_decodes < config.max_num_seqs:
            return config.max_num_batched_tokens
        return min(config.max_num_batched_tokens, max(config.max_mixed_tokens, 2 * num_decodes))

    def append(self, sequence: Sequence, token_id: int) -> None:
        """Adds the token that a step drew for a sequence that has not ended; it may have been preempted meanwhile."""
        sequence.append(token_id)
        if sequence.state is SequenceState.RUNNING:
            self._publish(sequence)

    def extend(self, sequence: Sequence, token_ids: tuple[int, ...]) -> bool:
        """`append` of all these tokens at once, if none of them ends the sequence; returns whether it did."""
        if not sequence.extend(token_ids):
            return False
        if sequence.state is SequenceState.RUNNING:
            self._publish(sequence)
        return True

    def accept(self, sequence: Sequence, num_drafts: int, num_verified: int) -> None:
        """A step kept the first `num_drafts` of the `num_verified` drafts of a sequence: `append` is to be called for
        each, and then for the token after them. What the others computed is void, and their pages are given back."""
        sequence.num_open -= num_verified
        sequence.num_drawn += num_drafts
        if sequence.state is SequenceState.RUNNING:  # else preempted since
            sequence.num_computed += num_drafts
            # What the drafter will want again stays where nobody waits; who is short of pages takes it back.
            self._shrink(sequence, 0 if self._num_waiting else sequence.num_wanted)

    def retract(self, sequence: Sequence, num_verified: int) -> None:
        """Takes back what the step that was scheduled last, which verifies `num_verified` drafts, draws for a sequence:
        its last token is computed again."""
        sequence.num_open -= num_verified
        sequence.num_drawn -= 1
        if sequence.state is SequenceState.RUNNING:
            self._shrink(sequence)
            sequence.num_computed -= 1

    def _shrink(self, sequence: Sequence, num_wanted: int = 0) -> None:
        # A drafter has written the slot of the next token, and may want as many more.
        ahead = max(1, num_wanted) if self.config.drafter_in_pages else 0
        self._drafts.keep(sequence, sequence.reach + ahead)

    def _is_held(self, sequence: Sequence) -> bool:
        return self.hold_constrained and sequence.request.constraint is not None

    def _is_put_off(self, sequence: Sequence) -> bool:
        """Whether a running sequence is left out of this step. Drafts in flight may end it, or need a slot of the
        drafter's that has no page: that is known when they are."""
        if sequence.may_await_last_token or self._is_held(sequence):
            return True
        if not (sequence.num_open and self.config.drafter_in_pages):
            return False
        return sequence.reach >= len(sequence.block_table) * PAGE_SIZE

    def _book(self, schedule: Schedule) -> None:
        """Takes a step as done: later ones may use its pages, which are written before they run."""
        for sequence, work in zip(schedule.sequences, schedule.plan.work, strict=True):
            sequence.num_computed = work.start + work.num_tokens - work.num_verified
            sequence.num_open += work.num_drafts
            sequence.drafts = sequence.siblings = ()
            if work.sample:
                sequence.num_drawn += 1
            if work.score:
                sequence.num_scored = min(sequence.num_computed + 1, sequence.num_prompt_tokens)
            self._publish(sequence)

    def _publish(self, sequence: Sequence) -> None:
        """Makes the pages that are full and whose tokens are known findable."""
        num_full = sequence.num_computed // PAGE_SIZE
        if num_full <= sequence.num_published or not self.config.enable_prefix_caching:
            return
        for index in range(sequence.num_published, min(num_full, len(sequence.page_hashes))):
            self.pool.publish(sequence.block_table[index], sequence.page_hashes[index])
            sequence.num_published = index + 1

    def _schedule_running(self, step: ScheduleBuilder) -> bool:
        """Gives each running sequence its share; returns whether one had to be preempted for it."""
        preemptions = self.num_preemptions
        prefilling = []
        ready = [sequence for sequence in self._running if not self._is_put_off(sequence)]
        if self.config.drafter_in_pages:
            for sequence in ready:
                if sequence.num_computed % PAGE_SIZE == 0:
                    self._drafts.step_back(sequence)
        if drafted := [sequence for sequence in ready if sequence.drafts]:
            most = self.config.max_num_batched_tokens
            # Drafts take nothing from prompts: that would put off sequences that could decode beside these.
            num_drafts = self._drafts.limit(self._running, drafted, step.budget, most)
            step.budget = min(step.budget + num_drafts, most)
        for sequence in ready:
            if sequence.num_pending > 1:
                prefilling.append(sequence)
            elif sequence.state is SequenceState.RUNNING:  # not preempted for one before it
                self._continue(sequence, 1 + len(sequence.drafts) + len(sequence.siblings), step)
        prefilling.sort(key=lambda sequence: sequence.order)
        for sequence in prefilling:
            if step.budget == 0:
                break
            if sequence.state is SequenceState.RUNNING:
                self._continue(sequence, min(sequence.num_pending, step.budget), step)
        return self.num_preemptions > preemptions

    def _continue(self, sequence: Sequence, num_tokens: int, step: ScheduleBuilder) -> None:
        if sequence.reach + num_tokens <= len(sequence.block_table) * PAGE_SIZE:
            step.add(sequence, num_tokens)
        elif self._make_room(sequence, num_tokens, step):
            step.add(sequence, num_tokens, self._grow(sequence, num_tokens))

    def _schedule_waiting(self, step: ScheduleBuilder) -> None:
        put_off = []
        while self._waiting and step.budget > 0 and self._slots:
            entry = heapq.heappop(self._waiting)
            sequence = entry[1]
            if sequence.state is not SequenceState.WAITING:
                continue
            if sequence.num_drawn or self._is_held(sequence):
                put_off.append(entry)  # preempted before its last token was read: a plan must name all of them
                continue
            cached = self._cached_pages(sequence)
            if self._is_being_computed(sequence, len(cached), step):
                put_off.append(entry)
            elif self._fits(sequence, cached):
                self._join(sequence, cached, step)
            else:
                put_off.append(entry)
                break
        for entry in put_off:
            heapq.heappush(self._waiting, entry)

    def _fits(self, sequence: Sequence, cached: list[int]) -> bool:
        # `cached` pages that nobody references count as available now and will not once they are shared.
        idle = sum(1 for page in cached if self.pool.references(page) == 0)
        return pages_for(len(sequence.token_ids) + 1) - len(cached) <= self.pool.available - idle

    def _is_being_computed(self, sequence: Sequence, num_cached: int, step: ScheduleBuilder) -> bool:
        if not self.config.enable_prefix_caching or sequence.scores_prompt:
            return False
        return num_cached < _num_shareable_pages(sequence) and step.computes(sequence.page_hashes[num_cached])

    def _join(self, sequence: Sequence, cached: list[int], step: ScheduleBuilder) -> None:
        self._num_waiting -= 1
        self._join_batch(sequence, cached)
        num_tokens = min(sequence.num_pending, step.budget)
        grant = self._grow(sequence, num_tokens)
        step.admit(sequence, PageGrant(sequence.slot, 0, tuple(cached) + (grant.pages if grant else ())))
        step.add(sequence, num_tokens)

    def _cached_pages(self, sequence: Sequence) -> list[int]:
        if not self.config.enable_prefix_caching or sequence.scores_prompt:
            return []
        return self.pool.match(sequence.page_hashes[: _num_shareable_pages(sequence)])

    def _join_batch(self, sequence: Sequence, cached: list[int]) -> None:
        self.pool.share(cached)
        sequence.block_table = list(cached)
        sequence.num_computed = len(cached) * PAGE_SIZE
        sequence.num_published = len(cached)
        if self.config.drafter_in_pages:
            self._drafts.step_back(sequence)
        sequence.num_wanted = self.num_wanted
        sequence.slot = self._slots.pop()
        sequence.state = SequenceState.RUNNING
        self._running.append(sequence)

    def _leave_batch(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.drafts = sequence.siblings = ()
        sequence.num_computed = sequence.num_published = 0
        self._slots.append(sequence.slot)
        sequence.slot = -1
        self._running.remove(sequence)

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        self._num_waiting += 1
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def _grow(self, sequence: Sequence, num_tokens: int) -> PageGrant | None:
        first = len(sequence.block_table)
        missing = pages_for(sequence.reach + num_tokens) - first
        if missing <= 0:
            return None
        pages = self.pool.allocate(missing)
        sequence.block_table.extend(pages)
        return PageGrant(sequence.slot, first, tuple(pages))

    def _make_room(self, sequence: Sequence, num_tokens: int, step: ScheduleBuilder) -> bool:
        """Preempts until `sequence` can grow; returns False if it was itself the one to give way."""
        missing = pages_for(sequence.reach + num_tokens) - len(sequence.block_table)
        while missing > self.pool.available:
            if self._drafts.take_back(self._running, sequence, step, self._is_put_off):
                continue
            victim = min(self._running, key=self._loss)
            step.remove(victim)
            self._leave_batch(victim)
            victim.num_preemptions += 1
            self.num_preemptions += 1
            self._wait(victim)
            if victim is sequence:
                return False
        return True

    def _loss(self, sequence: Sequence) -> tuple[bool, int, int, int]:
        """What preempting costs: nothing if only the last token is awaited, which comes all the same; then lower
        priorities first, then computed tokens in pages that nobody else keeps alive."""
        shared = sum(1 for page in sequence.block_table if self.pool.references(page) > 1)
        priority = sequence.request.priority
        return (not sequence.awaits_last_token, priority, sequence.num_computed - shared * PAGE_SIZE, -sequence.arrival)


def _num_shareable_pages(sequence: Sequence) -> int:
    # The last token is computed in any case: its logits are needed.
    return (len(sequence.token_ids) - 1) // PAGE_SIZE
