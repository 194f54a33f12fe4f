"""Runs work through an engine's core in this process and takes its times."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tqdm.auto import tqdm

from quire.cli.bench.workloads import Work
from quire.engine.core import EngineCore
from quire.service.interrupts import DeferredInterrupt
from quire.service.request import CacheKey, Constraint, Request, SamplingParams, StopConditions, Update

_GREEDY = SamplingParams(temperature=0.0)


@dataclass(slots=True)
class Run:
    """What one piece of work took, from the arrival of all its requests to the last token. Times are in seconds.

    `first_tokens` is each request's time to its first token; `decode_steps` what each step took after the last of
    these. `cached_tokens` are those of the prompts that were not computed.
    """

    requests: int
    input_tokens: int
    longest_output: int
    seconds: float = 0.0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    first_tokens: list[float] = field(default_factory=list)
    decode_steps: list[float] = field(default_factory=list)

    @property
    def output_tokens_per_second(self) -> float:
        """Of all requests."""
        return self.output_tokens / self.seconds

    @property
    def total_tokens_per_second(self) -> float:
        """Prompts, cached tokens included, and outputs."""
        return (self.input_tokens + self.output_tokens) / self.seconds

    @property
    def requests_per_second(self) -> float:
        """Those that ended."""
        return self.requests / self.seconds

    @property
    def prefill_tokens_per_second(self) -> float:
        """Computed prompt tokens until the last request has its first token."""
        return (self.input_tokens - self.cached_tokens) / max(self.first_tokens)

    @property
    def seconds_per_token(self) -> float:
        """Of the longest output, its prompt's time included."""
        return self.seconds / self.longest_output


class Meter:
    """Measures one core, which must be idle. `each_step` is called after each step."""

    def __init__(self, core: EngineCore, each_step: Callable[[], None] = lambda: None) -> None:
        self._core = core
        self._each_step = each_step
        self._keys = itertools.count()

    def run(self, work: Work, label: str = "", constraint: Constraint | None = None, salt: str = "") -> Run:
        """Submits everything at once, greedy, and steps until it is done, under a progress bar called `label`.

        Pages of prompts that were run with another `salt` are not found.
        Raises the error of a request that fails, and KeyboardInterrupt between two steps; the core is idle after both.
        """
        wanted = sum(job.output_len for job in work)
        bar = tqdm(total=wanted, desc=label, unit="tok", leave=False, dynamic_ncols=True, disable=None)
        with DeferredInterrupt() as interrupt, bar:
            keys: list[int] = []
            try:
                return self._measure(work, keys, constraint, CacheKey(salt), interrupt, bar)
            except BaseException:
                self._abort(keys)
                raise

    def _measure(
        self,
        work: Work,
        keys: list[int],
        constraint: Constraint | None,
        cache_key: CacheKey,
        interrupt: DeferredInterrupt,
        bar: tqdm[None],
    ) -> Run:
        core, stats = self._core, self._core.stats
        cached, preempted = stats.cached_prompt_tokens, core.scheduler.num_preemptions
        found = Run(len(work), sum(len(job.prompt) for job in work), max(job.output_len for job in work))
        began = last = time.perf_counter()
        for job in work:
            key, prompt = next(self._keys), tuple(job.prompt)
            keys.append(key)
            # An end that the grammar allows is taken, so that no request waits for a token that can't come.
            stop = StopConditions(job.output_len, ignore_eos=constraint is None)
            core.submit(key, Request(str(key), "", prompt, _GREEDY, stop, constraint=constraint, cache_key=cache_key))
        without_first = set(keys)
        while core.has_work:
            updates = core.step()
            self._each_step()
            now = time.perf_counter()
            drawn = _drawn(updates)
            if without_first:
                firsts = without_first.intersection(update.key for update in updates if update.token_ids)
                without_first -= firsts
                found.first_tokens += [now - began] * len(firsts)
            else:
                found.decode_steps.append(now - last)
            found.steps += 1
            found.output_tokens += drawn
            last = now
            bar.update(drawn)
            if interrupt.requested:
                raise KeyboardInterrupt
        found.seconds = last - began
        found.cached_tokens = stats.cached_prompt_tokens - cached
        found.preemptions = core.scheduler.num_preemptions - preempted
        return found

    def _abort(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._core.cancel(key)
        while self._core.has_work:
            self._core.step()


def _drawn(updates: Sequence[Update]) -> int:
    """How many tokens a step drew. Raises the error of a request that failed."""
    for update in updates:
        if update.finished is not None and update.finished.error is not None:
            raise update.finished.error
    return sum([len(update.token_ids) for update in updates])
