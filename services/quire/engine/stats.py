"""What the engine learns of itself: speeds for the router's cost model, counts and distributions for metrics."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from quire.engine.plan import StepPlan
from quire.engine.speculation.stats import SpeculationStats
from quire.service.request import FinishReason

# Weight of the newest step in the moving averages: about the last ten steps count.
_NEWEST = 0.1

# Seconds; from a token's time on a GPU to a long answer's on a CPU. Neighbours differ by a third to a half, so that a
# quantile read between two of them is near the truth.
_SECONDS = (
    0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75,
    1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
# More values than that are counted together sooner than one by one.
_ONE_BY_ONE = 32
_TOKENS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)


@dataclass(slots=True)
class Histogram:
    """`counts[i]` values were at most `bounds[i]` and above the bound before; the last count is of those above all."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    @property
    def count(self) -> int:
        """Of all values."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """0 if there are no values."""
        return self.sum / self.count if self.count else 0.0

    def add(self, value: float) -> None:
        """Counts one value."""
        self.sum += value
        self.counts[bisect_left(self.bounds, value)] += 1

    def add_all(self, values: Sequence[float]) -> None:
        """Counts a step's values at once."""
        if len(values) <= _ONE_BY_ONE:
            for value in values:
                self.add(value)
            return
        self.sum += sum(values)
        counts = np.bincount(np.searchsorted(self.bounds, values), minlength=len(self.counts))
        self.counts = (self.counts + counts).tolist()


@dataclass(slots=True)
class EngineStats:
    """Updated by the core after each step; times are in seconds.

    `queue_seconds`: from arrival to the first step. `first_token_seconds`: from arrival to the first token drawn.
    `inter_token_seconds`: from each token to the next of its request; those that come together count once, so that this
    and `first_token_seconds` count the sequences of all steps that drew tokens. `request_seconds`: from arrival to the
    end, of requests that came to an end of their own. `decode_tokens_per_step` is of one
    sequence. `finished`: requests by the value of their FinishReason.
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0
    # By value: an enum's members cost more to send to the server than all other fields.
    finished: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys((reason.value for reason in FinishReason), 0)
    )
    prefill_tokens_per_second: float = 0.0
    decode_step_seconds: float = 0.0
    decode_tokens_per_step: float = 0.0
    step_seconds: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    step_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    queue_seconds: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    first_token_seconds: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    inter_token_seconds: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    request_seconds: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    speculation: SpeculationStats | None = None

    def record_start(self, num_prompt_tokens: int, cached_tokens: int, waited: float) -> None:
        """A request was scheduled for the first time."""
        self.prompt_tokens += num_prompt_tokens
        self.cached_prompt_tokens += cached_tokens
        self.queue_seconds.add(waited)

    def record_step(self, plan: StepPlan, seconds: float) -> None:
        """A step ran. Its speed counts as prefill if most of its tokens were, as decode if all were."""
        num_tokens = sum([work.num_tokens for work in plan.work])
        num_prefill = sum([work.num_tokens for work in plan.work if work.num_tokens - work.num_drafts > 1])
        self.steps += 1
        self.computed_tokens += num_tokens
        self.step_seconds.add(seconds)
        self.step_tokens.add(num_tokens)
        # Short prompts say more about a step's fixed cost than about the speed of a long one.
        if num_prefill >= 32 and num_prefill * 2 > num_tokens:
            self.prefill_tokens_per_second = _blend(self.prefill_tokens_per_second, num_prefill / seconds)
        elif num_prefill == 0:
            self.decode_step_seconds = _blend(self.decode_step_seconds, seconds)

    def record_tokens(self, until_first: Sequence[float], between: Sequence[float], num_tokens: int) -> None:
        """A step drew `num_tokens` tokens: the first of some requests, and more of others.

        Those of one request come together and count once in what is between them.
        """
        self.output_tokens += num_tokens
        self.first_token_seconds.add_all(until_first)
        self.inter_token_seconds.add_all(between)
        if between:
            drawn = (num_tokens - len(until_first)) / len(between)
            self.decode_tokens_per_step = _blend(self.decode_tokens_per_step, drawn)

    def record_finish(self, reason: FinishReason, seconds: float) -> None:
        """A request ended `seconds` after it had arrived. One that was cut short says nothing of how long they take."""
        self.finished[reason.value] += 1
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.request_seconds.add(seconds)


def _blend(average: float, newest: float) -> float:
    return newest if average == 0.0 else average + _NEWEST * (newest - average)
