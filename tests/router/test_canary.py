"""Engines on trial: their share of the requests, what is counted of them, and that nothing is lost with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from router_testing import (
    assert_whole,
    endpoint_of,
    engines,
    gateway,
    holder_of,
    metric,
    prompt_of,
    request_of,
    router,
)

from quire.router.canary import Canary, Split
from quire.router.endpoint import Endpoint
from quire.router.index import PrefixIndex
from quire.router.service import RouterService
from quire.service.errors import InternalError, InvalidRequestError, OverloadedError, QuireError, UnavailableError
from quire.service.request import FinishReason


def endpoints_of(*percents: int | None) -> list[Endpoint]:
    index = PrefixIndex()
    found = [Endpoint(f"engine-{number}", index) for number in range(len(percents))]
    for endpoint, percent in zip(found, percents, strict=True):
        endpoint.canary = None if percent is None else Canary("r2", percent)
    return found


@given(percent=st.integers(0, 100), requests=st.integers(0, 500))
def test_they_get_their_share_of_any_number_of_requests(percent: int, requests: int) -> None:
    """A share that is only right on average may be none of the first hundred, or all of them."""
    stable, *on_trial = endpoints_of(None, percent, percent)
    split = Split()
    sides = [split.side([stable, *on_trial], moved=False) for _ in range(requests)]
    assert all(side in ([stable], on_trial) for side in sides)
    assert sum(side == on_trial for side in sides) == requests * percent // 100


def test_a_request_goes_where_engines_are() -> None:
    """A weight is no reason to refuse a request, nor to lose one that has been moved a second time."""
    stable, on_trial = endpoints_of(None, 100)
    split = Split()
    assert split.side([stable], moved=False) == [stable]
    assert split.side([on_trial], moved=False) == split.side([on_trial], moved=True) == [on_trial]
    assert split.side([stable, on_trial], moved=True) == [stable]


def attempts(service: RouterService, revision: str) -> tuple[float, float]:
    """Of the requests that engines of the revision had: those that ended well, and those that did not."""
    ok, failed = (metric(service, "attempts_total", revision=revision, outcome=each) for each in ("ok", "failed"))
    return ok, failed


@pytest.mark.parametrize(
    ("error", "counted", "moves"),
    [
        (InternalError("a bug"), (1, 1), 0),
        (UnavailableError("going"), (1, 1), 1),
        (OverloadedError("full"), (1, 1), 1),
        (InvalidRequestError("bad"), (2, 0), 0),
        (None, (2, 0), 0),
    ],
)
async def test_what_becomes_of_their_requests_is_counted(
    tmp_path: Path, error: QuireError | None, counted: tuple[int, int], moves: int
) -> None:
    """The operator ends a trial by these numbers; a fault that another engine made good is one all the same."""
    async with engines(tmp_path, 2) as fakes, router(tmp_path, fakes) as service, gateway(service) as session:
        endpoint_of(service, fakes[1]).canary = Canary("r2", 50)
        if error is not None:
            fakes[1].fail_next(error)
        ends = [(await session.submit(request_of(prompt_of(topic))).result()).reason for topic in range(4)]
        passed_on = int(error is not None and not moves)
        assert ends.count(FinishReason.LENGTH) == 4 - passed_on
        assert attempts(service, "r2") == counted
        assert attempts(service, "") == (2 + moves, 0)


async def test_an_engine_on_trial_that_dies_breaks_no_stream(tmp_path: Path) -> None:
    """What it had goes on at the others, and is counted against it once."""
    async with engines(tmp_path, 2) as fakes, router(tmp_path, fakes) as service, gateway(service) as session:
        canary = fakes[1]
        endpoint_of(service, canary).canary = Canary("r2", 100)
        canary.hold_at(3)
        requests = [request_of(prompt_of(topic), 8) for topic in range(3)]
        streams = [session.submit(request) for request in requests]
        for stream in streams:
            await stream.until_tokens(3)
        assert all(holder_of(fakes, request) is canary for request in requests)
        await canary.kill()
        for stream, request in zip(streams, requests, strict=True):
            await assert_whole(stream, request)
        assert attempts(service, "r2") == (0, 3)
        assert attempts(service, "") == (3, 0)
