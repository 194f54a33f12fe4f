"""The engine's core: `step()` is schedule → run → commit.

On a device that computes beside the host, the core runs ahead: it launches a step before it has read what the one
before drew, so the device never waits for Python. A sequence that turns out to have ended then is in one step too many,
whose result for it is dropped. Masks need the tokens before them: the forward pass is launched, the tokens are read,
the masks asked for, and only the draw waits for them. Drafts that the device makes it also verifies before the host has
read them: how many are right, and so where the sequence stands, the host learns a step later. Drafts of the host's need
the tokens before them: where there may be any, a step's tokens are read before the next is planned.

Knows neither gRPC nor processes: `core_process` drives it for the server, the offline API drives it in process. All
calls come from one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from quire.engine.masking import Masking
from quire.engine.masks import DraftResult, MaskSource
from quire.engine.plan import StepResult
from quire.engine.runner import PendingStep, Runner, StepMasks
from quire.engine.schedule import Schedule
from quire.engine.scheduler import Scheduler
from quire.engine.sequence import Sequence, SequenceState
from quire.engine.speculation.speculator import Speculator
from quire.engine.speculation.step_watch import StepTime
from quire.engine.stats import EngineStats
from quire.service.errors import DeadlineExceededError, InternalError, InvalidRequestError, QuireError
from quire.service.request import (
    Finished,
    FinishReason,
    PromptLogprobs,
    Request,
    Started,
    TokenLogprobs,
    Update,
    VerifiedDrafts,
)

# A step waits so long for its masks, then goes on without the sequences that need them. Without work, so long at once.
_PATIENCE_S = 0.25
_IDLE_S = 0.01


@dataclass(slots=True)
class _Step:
    """A step that was launched. `constrained` are the indexes of its work that masks apply to."""

    schedule: Schedule
    constrained: tuple[int, ...]
    pending: PendingStep
    masks: StepMasks | None
    began: float
    # Launched while the one before it ran.
    ahead: bool
    # Indexes of its work whose draws are void: masks did not come, or the tokens before them did not count.
    void: set[int] = field(default_factory=set)


class _Drawn(NamedTuple):
    """Of whom a step that was read has drawn how many tokens, and when that was."""

    sequences: list[Sequence]
    num_tokens: int
    at: float


class EngineCore:
    """One model, one batch. Every request that `submit` accepts ends in exactly one update with `finished`.

    `run_ahead`: a step is launched before the last one's tokens are read.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        masks: MaskSource | None,
        vocab_size: int,
        clock: Callable[[], float] = time.time,
        *,
        run_ahead: bool = False,
        speculator: Speculator | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.stats = EngineStats()
        self._runner = runner
        self._masking = Masking(masks, vocab_size) if masks is not None else None
        self._vocab_size = vocab_size
        self._clock = clock
        self._run_ahead = run_ahead
        self._speculator = speculator
        self.stats.speculation = speculator.stats if speculator is not None else None
        self._in_flight: _Step | None = None
        self._last_commit = 0.0  # 0: nothing has run since
        self._updates: list[Update] = []
        self._unrecorded: list[_Drawn] = []

    @property
    def vocab_size(self) -> int:
        """A prompt's tokens are below it."""
        return self._vocab_size

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to report."""
        unended = self.scheduler.num_running + self.scheduler.num_waiting > 0
        return unended or bool(self._updates) or self._in_flight is not None

    def submit(self, key: int, request: Request) -> None:
        """Queues a request; raises the error of a request that can't be run, which then never existed."""
        for name, tokens in (
            ("prompt_token_ids", request.prompt_token_ids),
            ("output_token_ids", request.output_token_ids),
            ("stop.stop_token_ids", request.stop.stop_token_ids),
            ("sampling.logit_bias", tuple(token for token, _ in request.sampling.logit_bias)),
            ("sampling.bad_words", tuple(chain.from_iterable(request.sampling.bad_words))),
        ):
            if (token := max(tokens, default=0)) >= self._vocab_size:
                raise InvalidRequestError(
                    f"{name} holds token {token}: the model's tokens are 0 to {self._vocab_size - 1}", field=name
                )
        if request.constraint is not None and self._masking is None:
            raise InvalidRequestError(
                "constraint is set and this engine has no sidecar: start one and name it with --sidecar",
                field="constraint",
            )
        sequence = self.scheduler.add(key, request)
        sequence.arrived_at = time.perf_counter()

    def cancel(self, key: int) -> None:
        """Ends a request and frees its pages at once; its terminal update comes with the next step's."""
        sequence = self.scheduler.get(key)
        if sequence is not None:
            self._finish(sequence, Finished(FinishReason.CANCELLED))

    def step(self) -> list[Update]:
        """Runs one step and returns what happened since the last."""
        self._end_expired()
        self._look_for_late_masks(0.0)
        self._propose()
        schedule = self.scheduler.schedule()
        step = self._launch(schedule) if schedule.plan.work else None
        self._commit_in_flight(step)
        if step is not None:
            self._draw(step)
            if self._run_ahead:
                self._in_flight = step
            else:
                self._commit(step, None)
        else:
            self._last_commit = 0.0
            self._look_for_late_masks(_IDLE_S)
        # The device has its next step.
        for drawn in self._unrecorded:
            self._record(*drawn)
        self._unrecorded.clear()
        if self._speculator is not None:
            self._speculator.learn()
        updates, self._updates = self._updates, []
        return updates

    def _propose(self) -> None:
        """Gives sequences their drafts for the next step."""
        if self._speculator is None:
            return
        if self._in_flight is not None and self._speculator.wants_tokens(self.scheduler):
            self._commit_in_flight(None)
        promised: dict[Sequence, int] = {}
        if self._in_flight is not None and any(work.num_wanted for work in self._in_flight.schedule.plan.work):
            schedule, void = self._in_flight.schedule, self._in_flight.void
            for index, (sequence, work) in enumerate(zip(schedule.sequences, schedule.plan.work, strict=True)):
                if work.num_wanted and index not in void:
                    promised[sequence] = work.num_wanted
        self._speculator.propose(self.scheduler, promised)
        self.scheduler.num_wanted = self._speculator.num_wanted

    def _commit_in_flight(self, following: _Step | None) -> None:
        """Reads the step in flight; `following` was launched behind it."""
        if self._in_flight is not None:
            self._commit(self._in_flight, following)
            self._in_flight = None

    def prepare(self) -> bool:
        """Does a part of what makes later steps faster, while there is no work; returns whether there may be more."""
        return self._runner.prepare()

    def close(self) -> None:
        """Lets go of the device and of the sidecar."""
        self._runner.close()
        if self._masking is not None:
            self._masking.close()
        if self._speculator is not None:
            self._speculator.close()

    def _launch(self, schedule: Schedule) -> _Step:
        began, masks = time.perf_counter(), None
        constrained: tuple[int, ...] = ()
        if self._masking is not None:
            constrained = tuple(
                index
                for index, (sequence, work) in enumerate(zip(schedule.sequences, schedule.plan.work, strict=True))
                if work.sample and sequence.request.constraint is not None
            )
            # Where all tokens are known the sidecar works while the forward pass does.
            masks = self._ask(schedule, constrained, self._masking) if self._in_flight is None else None
        pending = self._runner.launch(schedule.plan, masked=bool(constrained))
        return _Step(schedule, constrained, pending, masks, began, self._in_flight is not None)

    def _draw(self, step: _Step) -> None:
        if self._masking is None:
            return
        if step.masks is None:
            constrained = tuple(index for index in step.constrained if index not in step.void)
            step.masks = self._ask(step.schedule, constrained, self._masking)
        if step.constrained:
            if step.masks is not None and not step.masks.arrive(_PATIENCE_S):
                for index in step.masks.work:
                    self._retract(step, index)
                self.scheduler.hold_constrained = True
                step.masks = self._masking.do_without(step.schedule, step.masks)
            step.pending.draw(step.masks)

    def _ask(self, schedule: Schedule, constrained: tuple[int, ...], masking: Masking) -> StepMasks | None:
        max_forced = self._speculator.forced_to_ask() if constrained and self._speculator is not None else 0
        return masking.ask(schedule, constrained, max_forced)

    def _retract(self, step: _Step, index: int) -> None:
        """What work `index` of the step that was launched last draws is void."""
        step.void.add(index)
        self.scheduler.retract(step.schedule.sequences[index], step.schedule.plan.work[index].num_drafts)

    def _look_for_late_masks(self, seconds: float) -> None:
        """If masks that were late have come, the sequences that wait for masks go on: they ask again."""
        broken = self._masking.late_arrive(seconds) if self._masking is not None else None
        if broken is not None:
            self.scheduler.hold_constrained = False
            for sequence, error in broken.items():
                self._finish(sequence, Finished(FinishReason.ERROR, error))

    def _commit(self, step: _Step, following: _Step | None) -> None:
        result, schedule = step.pending.wait(), step.schedule
        now = time.perf_counter()
        # A step that was launched while another ran began when that one ended.
        self.stats.record_step(schedule.plan, now - max(step.began, self._last_commit))
        # What drafts cost includes what the host does before their step, while the device has nothing to do.
        seconds, self._last_commit = now - (self._last_commit or step.began), now
        for sequence, cached_tokens in schedule.started:
            if sequence.state is not SequenceState.FINISHED:
                self.stats.record_start(sequence.num_prompt_tokens, cached_tokens, step.began - sequence.arrived_at)
                self._updates.append(Update(sequence.key, started=Started(cached_tokens)))
        errors = step.masks.batch.errors if step.masks is not None else {}
        results = step.masks.batch.results if step.masks is not None else {}
        self._tell_time(step, result, seconds)
        speculator = self._speculator
        if speculator is not None and not (schedule.drafts or result.drafts or results or speculator.awaits_tokens):
            speculator = None
        drawn, num_tokens = [], 0
        for index, (sequence, work) in enumerate(zip(schedule.sequences, schedule.plan.work, strict=True)):
            if sequence.state is SequenceState.FINISHED:
                continue
            if work.score and (scores := result.prompt_logprobs.get(index)):
                self._updates.append(Update(sequence.key, prompt_logprobs=PromptLogprobs(work.start + 1, scores)))
            if not work.sample or index in step.void:
                continue
            drawn.append(sequence)
            if speculator is None:
                tokens: tuple[int, ...] = (result.token_ids[index],)
            else:
                tokens = self._take_drafts(speculator, step, result, index, results.get(sequence.key), following)
            error = errors.get(sequence.key)
            logprobs = result.logprobs.get(index, ())
            num_tokens += self._commit_tokens(sequence, tokens, logprobs, error, work.num_verified)
        self._unrecorded.append(_Drawn(drawn, num_tokens, now))
        if not self.scheduler.num_running:
            self._last_commit = 0.0

    def _record(self, drawn: list[Sequence], num_tokens: int, now: float) -> None:
        until_first, between = [], []
        for sequence in drawn:
            if sequence.last_token_at is None:
                until_first.append(now - sequence.arrived_at)
            else:
                between.append(now - sequence.last_token_at)
            sequence.last_token_at = now
        self.stats.record_tokens(until_first, between, num_tokens)

    def _tell_time(self, step: _Step, result: StepResult, seconds: float) -> None:
        """Tells the speculator what a step took."""
        speculator, work = self._speculator, step.schedule.plan.work
        if speculator is None or not work or speculator.is_resting:
            return
        num_computed = sum(one.num_tokens for one in work)
        # A device that waited for the host, and then had no drafts to verify, did what neither step usually does.
        usual = bool(step.schedule.drafts) or step.ahead or not self._run_ahead
        told = StepTime(
            num_computed,
            num_computed + sum(one.start for one in work),
            seconds if usual else None,
            max(one.num_wanted for one in work),
            result.draft_seconds,
            sum(one.num_verified for one in work),
            result.waited_seconds if step.ahead else None,
            masked=bool(step.constrained),
        )
        speculator.observe_step(told if result.repeatable else None)

    def _take_drafts(
        self,
        speculator: Speculator,
        step: _Step,
        result: StepResult,
        index: int,
        grammar: DraftResult | None,
        following: _Step | None,
    ) -> tuple[int, ...]:
        """What work `index` of a step drew: drafts that are right, and the token after them. Tells the speculator."""
        sequence, work = step.schedule.sequences[index], step.schedule.plan.work[index]
        tokens: tuple[int, ...] = (result.token_ids[index],)
        verified, drafts, drafter = step.schedule.drafts.get(sequence), result.drafts.get(index), None
        if verified is not None:
            drafter, kept = verified.drafter, verified.token_ids[: result.accepted[index]]
            if work.num_siblings:
                drafted, kept = kept, result.kept[index]
                speculator.observe_siblings(work.num_siblings, kept != drafted)
            tokens = kept + tokens
            if grammar is not None and len(tokens) > grammar.num_drafts + 1:
                # Behind what the grammar allows nothing was masked.
                tokens = tokens[: grammar.num_drafts + 1]
                self._void(following, sequence)
            self.scheduler.accept(sequence, len(tokens) - 1, work.num_drafts)
        if drafts and following is not None and (unread := following.schedule.drafts.get(sequence)) is not None:
            unread.token_ids = drafts[: len(unread.token_ids)]
        forced = grammar.forced if grammar is not None else None
        siblings = result.siblings.get(index, ()) if result.siblings else ()
        speculator.observe(sequence, drafter, work.num_drafts, tokens, forced, drafts, siblings)
        return tokens

    def _void(self, step: _Step | None, sequence: Sequence) -> None:
        """What `step`, if it was launched, draws for a sequence is void: the device counts drafts that are none."""
        if step is not None and sequence in step.schedule.sequences:
            self._retract(step, step.schedule.sequences.index(sequence))

    def _commit_tokens(
        self,
        sequence: Sequence,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        error: QuireError | None,
        num_verified: int,
    ) -> int:
        """Adds what a step drew after it had verified so many drafts and siblings; returns how many tokens count."""
        # Most steps end nothing.
        if error is None and token_ids[-1] >= 0 and self.scheduler.extend(sequence, token_ids):
            count = len(token_ids)
            drafts = VerifiedDrafts(count - 1, num_verified - count + 1) if num_verified else None
            self._updates.append(Update(sequence.key, token_ids, None, None, logprobs[:count], None, drafts))
            return count
        count, reason, drafts = 0, None, None
        for token_id in token_ids if error is None else ():
            if token_id < 0:
                error = InternalError("the model's logits are not finite: its weights or this input are broken")
                break
            self.scheduler.append(sequence, token_id)
            count += 1
            if (reason := sequence.finish_reason()) is not None:
                break
        if num_verified:
            accepted = min(count, len(token_ids) - 1)
            drafts = VerifiedDrafts(accepted, num_verified - accepted)
        if error is not None:
            self._finish(sequence, Finished(FinishReason.ERROR, error), token_ids[:count], logprobs[:count], drafts)
        elif reason is not None:
            self._finish(sequence, Finished(reason), token_ids[:count], logprobs[:count], drafts)
        else:
            self._updates.append(Update(sequence.key, token_ids, None, None, logprobs[:count], None, drafts))
        return count

    def _end_expired(self) -> None:
        for sequence in self.scheduler.expired(int(self._clock() * 1000)):
            error = DeadlineExceededError("the request's deadline passed before it was done", field="deadline_unix_ms")
            self._finish(sequence, Finished(FinishReason.ERROR, error))

    def _finish(
        self,
        sequence: Sequence,
        finished: Finished,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        drafts: VerifiedDrafts | None = None,
    ) -> None:
        self.scheduler.finish(sequence)
        if self._speculator is not None:
            self._speculator.forget(sequence.key)
        self.stats.record_finish(finished.reason, time.perf_counter() - sequence.arrived_at)
        if self._masking is not None and sequence.request.constraint is not None:
            self._masking.released.append(sequence.key)
        self._updates.append(Update(sequence.key, token_ids, None, finished, logprobs, None, drafts))
