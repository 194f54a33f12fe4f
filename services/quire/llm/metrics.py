"""What an LLM tells of itself at one moment."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

from quire.engine.core import EngineCore
from quire.engine.speculation.stats import SpeculationStats
from quire.engine.stats import Histogram


@dataclass(frozen=True, slots=True)
class Distribution:
    """`counts[i]` values were at most `bounds[i]` and above the bound before; the last count is of those above all."""

    count: int
    mean: float
    bounds: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LLMMetrics:
    """Now: requests running and waiting, pages of 16 tokens by state. Since the start: all the rest; times in seconds.

    hit_rate: the share of all prompt tokens whose pages were there already. tokens_per_step: computed ones, prompts
    included. queue_seconds, first_token_seconds: from a request's arrival. inter_token_seconds: from each token of a
    request to its next; those that come together count once. finished: requests by finish_reason, "cancelled" and
    "error" among them; request_seconds: how long those took that came to an end of their own. drafted_tokens,
    verified_tokens, accepted_tokens: by who drafted them, empty without speculation; accepted_by_position: the share of
    a step's first, second, … drafts of a request that were right.
    """

    running: int
    waiting: int
    pages_total: int
    pages_used: int
    pages_cached: int
    hit_rate: float
    preemptions: int
    finished: dict[str, int]
    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int
    steps: int
    tokens_per_step: Distribution
    step_seconds: Distribution
    queue_seconds: Distribution
    first_token_seconds: Distribution
    inter_token_seconds: Distribution
    request_seconds: Distribution
    drafted_tokens: dict[str, int]
    verified_tokens: dict[str, int]
    accepted_tokens: dict[str, int]
    accepted_by_position: tuple[float, ...]


def metrics_of(core: EngineCore) -> LLMMetrics:
    """The metrics of `core` as they are now."""
    scheduler, pool, stats = core.scheduler, core.scheduler.pool, core.stats
    drafts = stats.speculation or SpeculationStats(drafted={}, verified={}, accepted={})
    return LLMMetrics(
        running=scheduler.num_running,
        waiting=scheduler.num_waiting,
        pages_total=pool.num_pages,
        pages_used=pool.num_pages - pool.available,
        pages_cached=pool.cached,
        hit_rate=stats.cached_prompt_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0,
        preemptions=scheduler.num_preemptions,
        finished={reason.lower(): count for reason, count in stats.finished.items()},
        prompt_tokens=stats.prompt_tokens,
        cached_prompt_tokens=stats.cached_prompt_tokens,
        output_tokens=stats.output_tokens,
        steps=stats.steps,
        tokens_per_step=_distribution(stats.step_tokens),
        step_seconds=_distribution(stats.step_seconds),
        queue_seconds=_distribution(stats.queue_seconds),
        first_token_seconds=_distribution(stats.first_token_seconds),
        inter_token_seconds=_distribution(stats.inter_token_seconds),
        request_seconds=_distribution(stats.request_seconds),
        drafted_tokens=dict(drafts.drafted),
        verified_tokens=dict(drafts.verified),
        accepted_tokens=dict(drafts.accepted),
        accepted_by_position=tuple(
            right / verified for right, verified in zip_longest(drafts.accepted_at, drafts.verified_at, fillvalue=0)
        ),
    )


def _distribution(histogram: Histogram) -> Distribution:
    return Distribution(histogram.count, histogram.mean, histogram.bounds, tuple(histogram.counts))
