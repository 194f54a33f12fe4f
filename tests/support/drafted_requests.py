"""Requests for tests that compare outputs with drafts to those without, and what they get."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from quire.engine.core import EngineCore
from quire.service.request import Constraint, Request, SamplingParams, StopConditions, TokenLogprobs

SAMPLING = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 5]),
    seed=st.integers(0, 2**64 - 1),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    bad_words=st.sampled_from([(), (), ((4, 5), (7,))]),
)


@st.composite
def drafted_requests(
    draw: st.DrawFn, vocab_size: int, max_tokens: int = 24, constraints: Sequence[Constraint | None] = (None,)
) -> Request:
    """Anything that changes which token is drawn, or when an output ends."""
    num_tokens, constraint = draw(st.integers(1, max_tokens)), draw(st.sampled_from(constraints))
    stop = StopConditions(
        num_tokens,
        draw(st.sampled_from([(), (9,)])),
        min_tokens=draw(st.integers(0, num_tokens)),
        ignore_eos=constraint is None and draw(st.booleans()),
    )
    prompt = draw(st.lists(st.integers(3, vocab_size - 1), min_size=1, max_size=30).map(tuple))
    logprobs = draw(st.sampled_from([None, 0, 2]))
    return Request("r", "m", prompt, draw(SAMPLING), stop, logprobs=logprobs, constraint=constraint)


@dataclass(frozen=True)
class Output:
    """What one request got."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    reason: str


def run(
    core: EngineCore, requests: Sequence[Request], arrivals: Sequence[int], cancels: Mapping[int, int] | None = None
) -> list[Output]:
    """Request i is submitted before step `arrivals[i]`, and cancelled before step `cancels[i]`, if that is given."""
    tokens: dict[int, list[int]] = {key: [] for key in range(len(requests))}
    logprobs: dict[int, list[TokenLogprobs]] = {key: [] for key in tokens}
    prompts: dict[int, list[TokenLogprobs]] = {key: [] for key in tokens}
    reasons: dict[int, str] = {}
    number = 0
    while len(reasons) < len(requests):
        for key, request in enumerate(requests):
            if arrivals[key] == number:
                core.submit(key, request)
            if cancels is not None and cancels.get(key) == number:
                core.cancel(key)
        for update in core.step():
            tokens[update.key] += update.token_ids
            logprobs[update.key] += update.logprobs
            if update.prompt_logprobs is not None:
                prompts[update.key] += update.prompt_logprobs.tokens
            if update.finished is not None:
                reasons[update.key] = update.finished.reason.value
        number += 1
    assert core.scheduler.pool.available == core.scheduler.pool.num_pages
    return [Output(tuple(tokens[key]), tuple(logprobs[key]), tuple(prompts[key]), reasons[key]) for key in tokens]


def same_outputs(found: Sequence[Output], expected: Sequence[Output]) -> None:
    """The same tokens, ends and ranks, and log-probabilities up to rounding."""
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.reason) == (other.token_ids, other.reason)
        told, expected_to_be = (*one.prompt_logprobs, *one.logprobs), (*other.prompt_logprobs, *other.logprobs)
        for mine, theirs in zip(told, expected_to_be, strict=True):
            assert mine.rank == theirs.rank and math.isclose(mine.logprob, theirs.logprob, abs_tol=1e-4)
