"""All engines together: which there are, which of them are ready, and which one a request goes to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from quire.router.canary import Split
from quire.router.cost import (
    FIRST_GUESS_OUTPUT_TOKENS,
    FIRST_GUESS_PREFILL_TOKENS_PER_SECOND,
    Expectations,
    expected_ttft,
)
from quire.router.endpoint import Endpoint
from quire.router.index import PrefixIndex
from quire.service.pages import PAGE_SIZE

# Weight of the newest output in the mean length: about the last fifty count.
_NEWEST_OUTPUT = 0.02


# Expected times that differ by less than this share are equal: no engine's speed is known better.
_TIE = 0.05


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine that a request goes to, and what is expected of it there."""

    endpoint: Endpoint
    expected_ttft: float
    matched_tokens: int


class Fleet:
    """The engines and one index of all their pages."""

    def __init__(self) -> None:
        self.index = PrefixIndex()
        self.endpoints: list[Endpoint] = []
        self._expectations = Expectations()
        self._output_tokens = FIRST_GUESS_OUTPUT_TOKENS
        self._turn = 0
        self._split = Split()

    @property
    def ready(self) -> bool:
        """Whether any engine takes requests."""
        return any(endpoint.routable for endpoint in self.endpoints)

    @property
    def models(self) -> list[str]:
        """What the engines serve, as far as they have said."""
        return sorted({endpoint.model for endpoint in self.endpoints if endpoint.model})

    @property
    def states(self) -> str:
        """Each engine's state, for messages."""
        return "; ".join(f"{endpoint.name} {endpoint.state}" for endpoint in self.endpoints) or "there is none"

    def add(self, address: str) -> Endpoint:
        """A new engine, not connected yet."""
        endpoint = Endpoint(address, self.index)
        self.endpoints.append(endpoint)
        return endpoint

    def remove(self, endpoint: Endpoint) -> None:
        """Forgets an engine that is not connected."""
        self.endpoints.remove(endpoint)
        endpoint.cache.close()

    def ready_for(self, model: str) -> list[Endpoint]:
        """The engines that take requests for `model`."""
        return [endpoint for endpoint in self.endpoints if endpoint.routable and endpoint.model == model]

    def choose(self, model: str, keys: Sequence[int], num_tokens: int, avoid: Collection[Endpoint]) -> Choice | None:
        """The engine with the smallest expected time to first token; None if none is ready.

        `keys` are the index's keys of the prompt's pages, `num_tokens` its length. Engines in `avoid` are chosen if
        there is no other. Where some are on trial, it is first settled whether the request goes to one of them. Ties
        go to the engine that has to compute least, so that a burst with one new prefix gathers where it is being
        computed, then to the one with the fewest requests in flight, then in turn.
        """
        ready = self.ready_for(model)
        candidates = [endpoint for endpoint in ready if endpoint not in avoid] or ready
        if not candidates:
            return None
        candidates = self._split.side(candidates, moved=bool(avoid))
        # The engine computes at least the last token, so a page that ends with it saves this request nothing.
        keys = keys[: (num_tokens - 1) // PAGE_SIZE]
        matches = self.index.match(keys)
        choices = []
        for endpoint in candidates:
            matched = max(matches.get(endpoint.cache.holder, 0), endpoint.in_progress.match(keys)) * PAGE_SIZE
            seconds = expected_ttft(endpoint.view, num_tokens - matched, self._expectations)
            choices.append(Choice(endpoint, seconds, matched))
        soonest = min(choice.expected_ttft for choice in choices)
        ties = [choice for choice in choices if choice.expected_ttft <= soonest * (1 + _TIE)]
        self._turn += 1
        first = self._turn % len(ties)
        return min(
            ties[first:] + ties[:first], key=lambda choice: (-choice.matched_tokens, len(choice.endpoint.flights))
        )

    def learn_output(self, num_tokens: int) -> None:
        """A request ended by itself after this many output tokens."""
        self._output_tokens += _NEWEST_OUTPUT * (num_tokens - self._output_tokens)

    def learn_speeds(self) -> None:
        """An engine has reported: one that has not measured its own speed is expected to be like the others."""
        speeds = [speed for endpoint in self.endpoints if (speed := endpoint.prefill_tokens_per_second)]
        mean = sum(speeds) / len(speeds) if speeds else FIRST_GUESS_PREFILL_TOKENS_PER_SECOND
        self._expectations = Expectations(mean, self._output_tokens)
