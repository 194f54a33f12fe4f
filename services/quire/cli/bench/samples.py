"""What `quire bench` measured, as numbers, JSON and a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. Times are in seconds on one monotonic clock; `arrivals` are those of the pieces of text."""

    began: float
    ended: float
    arrivals: tuple[float, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    # Empty if the request succeeded.
    error: str = ""


@dataclass(frozen=True, slots=True)
class Distribution:
    """In seconds."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """None if there are no values."""
        if not values:
            return None
        p50, p99 = np.percentile(values, (50, 99))
        return cls(float(np.mean(values)), float(p50), float(p99))


@dataclass(frozen=True, slots=True)
class Summary:
    """A run. Rates count what succeeded, from the first request sent to the last answer's end.

    `inter_token` is the time between two pieces of text of one answer; a server may send several tokens in a piece.
    """

    seconds: float
    succeeded: int
    failed: int
    errors: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    time_to_first_token: Distribution | None
    inter_token: Distribution | None
    end_to_end: Distribution | None

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Summary:
        """Sums up what was measured; there may be nothing."""
        good = [sample for sample in samples if not sample.error]
        seconds = max((s.ended for s in samples), default=0.0) - min((s.began for s in samples), default=0.0)
        prompt_tokens, output_tokens = sum(s.prompt_tokens for s in good), sum(s.output_tokens for s in good)
        errors = Counter(sample.error for sample in samples if sample.error)
        per_second = 1 / seconds if seconds else 0.0
        return cls(
            seconds=seconds,
            succeeded=len(good),
            failed=errors.total(),
            errors=dict(errors.most_common()),
            prompt_tokens=prompt_tokens,
            cached_tokens=sum(s.cached_tokens for s in good),
            output_tokens=output_tokens,
            requests_per_second=len(good) * per_second,
            output_tokens_per_second=output_tokens * per_second,
            total_tokens_per_second=(prompt_tokens + output_tokens) * per_second,
            time_to_first_token=Distribution.of([s.arrivals[0] - s.began for s in good if s.arrivals]),
            inter_token=Distribution.of([gap for s in good for gap in _gaps(s.arrivals)]),
            end_to_end=Distribution.of([s.ended - s.began for s in good]),
        )

    def to_json(self) -> dict[str, Any]:
        """All of it; times in seconds."""
        return asdict(self)

    def tables(self) -> list[Table]:
        """For a terminal."""
        failed = f", {self.failed} failed" if self.failed else ""
        rates = Table(title=f"{self.succeeded} answers in {self.seconds:.2f} s{failed}", title_justify="left")
        for title in ("", "per second", "total", "per request"):
            rates.add_column(title, justify="left" if not title else "right")
        total = self.prompt_tokens + self.output_tokens
        rates.add_row("requests", f"{self.requests_per_second:.2f}", str(self.succeeded), "")
        rates.add_row("output tokens", f"{self.output_tokens_per_second:.1f}", *self._counts(self.output_tokens))
        rates.add_row("input tokens", "", *self._counts(self.prompt_tokens))
        rates.add_row("of them cached", "", *self._counts(self.cached_tokens))
        rates.add_row("all tokens", f"{self.total_tokens_per_second:.1f}", *self._counts(total))

        times = Table(title="milliseconds", title_justify="left")
        for title in ("", "mean", "p50", "p99"):
            times.add_column(title, justify="left" if not title else "right")
        for title, values in (
            ("time to first token", self.time_to_first_token),
            ("inter-token time", self.inter_token),
            ("end to end", self.end_to_end),
        ):
            cells = (values.mean, values.p50, values.p99) if values else ()
            times.add_row(title, *(f"{1000 * seconds:.1f}" for seconds in cells))
        return [rates, times]

    def _counts(self, tokens: int) -> tuple[str, str]:
        return str(tokens), f"{tokens / self.succeeded:.1f}" if self.succeeded else ""


def _gaps(arrivals: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(arrivals)]
