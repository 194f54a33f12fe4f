"""The engine's core: `step()` is schedule → run → commit.

Knows neither gRPC nor processes: `core_process` drives it for the server, the offline API drives it in process. All
calls come from one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import chain

from quire.engine.masks import MaskRequest, MaskSource
from quire.engine.plan import StepResult
from quire.engine.runner import Runner, StepMasks
from quire.engine.scheduler import Schedule, Scheduler
from quire.engine.sequence import Sequence
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
)


class EngineCore:
    """One model, one batch. Every request that `submit` accepts ends in exactly one update with `finished`."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        masks: MaskSource | None,
        vocab_size: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.scheduler = scheduler
        self.stats = EngineStats()
        self._runner = runner
        self._masks = masks
        self._vocab_size = vocab_size
        self._clock = clock
        self._updates: list[Update] = []
        self._released: list[int] = []

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return bool(self._updates) or self.scheduler.num_running + self.scheduler.num_waiting > 0

    def submit(self, key: int, request: Request) -> None:
        """Queues a request; raises the error of a request that can't be run, which then never existed."""
        for field, tokens in (
            ("prompt_token_ids", request.prompt_token_ids),
            ("output_token_ids", request.output_token_ids),
            ("stop.stop_token_ids", request.stop.stop_token_ids),
            ("sampling.logit_bias", tuple(token for token, _ in request.sampling.logit_bias)),
            ("sampling.bad_words", tuple(chain.from_iterable(request.sampling.bad_words))),
        ):
            if (token := max(tokens, default=0)) >= self._vocab_size:
                raise InvalidRequestError(
                    f"{field} holds token {token}: the model's tokens are 0 to {self._vocab_size - 1}", field=field
                )
        if request.constraint is not None and self._masks is None:
            raise InvalidRequestError(
                "constraint is set and this engine has no sidecar: start one and name it with --sidecar",
                field="constraint",
            )
        self.scheduler.add(key, request).arrived_at = time.perf_counter()

    def cancel(self, key: int) -> None:
        """Ends a request and frees its pages at once; its terminal update comes with the next step's."""
        sequence = self.scheduler.get(key)
        if sequence is not None:
            self._finish(sequence, Finished(FinishReason.CANCELLED))

    def step(self) -> list[Update]:
        """Runs one step and returns what happened since the last."""
        self._end_expired()
        schedule = self.scheduler.schedule()
        if schedule.plan.work:
            began = time.perf_counter()
            masks = self._begin_masks(schedule)
            result = self._runner.launch(schedule.plan, masks).wait()
            ended = time.perf_counter()
            self.stats.record_step(schedule.plan, ended - began)
            self._commit(schedule, result, masks, ended)
        updates, self._updates = self._updates, []
        return updates

    def close(self) -> None:
        """Lets go of the sidecar."""
        if self._masks is not None:
            self._masks.close()

    def _begin_masks(self, schedule: Schedule) -> StepMasks | None:
        if self._masks is None:
            return None
        work, requests = [], []
        for index, (sequence, item) in enumerate(zip(schedule.sequences, schedule.plan.work, strict=True)):
            constraint = sequence.request.constraint
            if item.sample and constraint is not None:
                work.append(index)
                requests.append(MaskRequest(sequence.key, constraint, sequence.output_token_ids))
        if not requests and not self._released:
            return None
        ticket = self._masks.begin(requests, self._released)
        self._released = []
        return StepMasks(tuple(work), ticket)

    def _commit(self, schedule: Schedule, result: StepResult, masks: StepMasks | None, now: float) -> None:
        self.scheduler.commit(schedule)
        for sequence, cached_tokens in schedule.started:
            self.stats.record_start(sequence.num_prompt_tokens, cached_tokens, now - sequence.arrived_at)
            self._updates.append(Update(sequence.key, started=Started(cached_tokens)))
        errors = masks.batch.errors if masks is not None else {}
        until_first, between = [], []
        for index, (sequence, work) in enumerate(zip(schedule.sequences, schedule.plan.work, strict=True)):
            if work.score and (scores := result.prompt_logprobs.get(index)):
                self._updates.append(Update(sequence.key, prompt_logprobs=PromptLogprobs(work.start + 1, scores)))
            if not work.sample:
                continue
            if sequence.last_token_at is None:
                until_first.append(now - sequence.arrived_at)
            else:
                between.append(now - sequence.last_token_at)
            sequence.last_token_at = now
            logprobs = (result.logprobs[index],) if index in result.logprobs else ()
            self._commit_token(sequence, result.token_ids[index], logprobs, errors.get(sequence.key))
        self.stats.record_tokens(until_first, between)

    def _commit_token(
        self, sequence: Sequence, token_id: int, logprobs: tuple[TokenLogprobs, ...], error: QuireError | None
    ) -> None:
        if error is None and token_id < 0:
            error = InternalError("the model's logits are not finite: its weights or this input are broken")
        if error is not None:
            self._finish(sequence, Finished(FinishReason.ERROR, error))
            return
        sequence.append(token_id)
        reason = sequence.finish_reason()
        if reason is None:
            self._updates.append(Update(sequence.key, (token_id,), None, None, logprobs))
        else:
            self._finish(sequence, Finished(reason), (token_id,), logprobs)

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
    ) -> None:
        self.scheduler.finish(sequence)
        if sequence.request.constraint is not None:
            self._released.append(sequence.key)
        self._updates.append(Update(sequence.key, token_ids, None, finished, logprobs))
