"""The transport-free request and its message: what is sent is what arrives."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.service.errors import ErrorCode, InvalidRequestError, error_of
from quire.service.request import (
    CacheKey,
    Constraint,
    ConstraintKind,
    Finished,
    FinishReason,
    PromptLogprobs,
    Request,
    SamplingParams,
    Started,
    StopConditions,
    TokenLogprobs,
    TraceContext,
    Update,
    VerifiedDrafts,
)
from quire.service.wire import request_from_proto, request_to_proto, update_from_proto, update_to_proto
from quire.v1 import request_pb2, session_pb2


def float32(low: float, high: float) -> st.SearchStrategy[float]:
    def nearest(value: float) -> float:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])

    return st.floats(low, high, width=32).map(nearest)


TOKEN = st.integers(0, 2**31 - 1)
TOKENS = st.lists(TOKEN, max_size=4).map(tuple)
sampling = st.builds(
    SamplingParams,
    temperature=float32(0, 100),
    top_p=float32(0.125, 1),
    top_k=TOKEN,
    seed=st.integers(0, 2**64 - 1),
    min_p=float32(0, 1),
    presence_penalty=float32(-2, 2),
    frequency_penalty=float32(-2, 2),
    repetition_penalty=float32(0.125, 100),
    logit_bias=st.lists(st.tuples(TOKEN, float32(-100, 100)), max_size=3).map(tuple),
    bad_words=st.lists(st.lists(TOKEN, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
)
constraints = st.builds(
    Constraint,
    st.sampled_from([ConstraintKind.JSON_SCHEMA, ConstraintKind.REGEX, ConstraintKind.LARK]),
    st.text(min_size=1),
) | st.just(Constraint(ConstraintKind.JSON_OBJECT))
requests = st.builds(
    Request,
    request_id=st.text(min_size=1),
    model=st.text(),
    prompt_token_ids=st.lists(TOKEN, min_size=1, max_size=4).map(tuple),
    sampling=sampling,
    stop=st.builds(
        StopConditions, st.integers(10, 2**31 - 1), stop_token_ids=TOKENS, min_tokens=st.integers(0, 10)
    ),
    output_token_ids=TOKENS,
    constraint=st.none() | constraints,
    cache_key=st.builds(CacheKey, st.text(), st.text(), st.lists(st.binary(min_size=32, max_size=32)).map(tuple)),
    priority=st.integers(-(2**31), 2**31 - 1),
    deadline_unix_ms=st.none() | st.integers(0, 2**62),
    trace=st.builds(TraceContext, st.text(), st.text()),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
)  # fmt: skip
scores = st.builds(
    TokenLogprobs, float32(-100, 0), st.integers(1, 2**31), st.lists(st.tuples(TOKEN, float32(-100, 0))).map(tuple)
)
errors = st.builds(error_of, st.sampled_from(ErrorCode), st.text(), st.text(), st.none() | st.floats(0, 1e6))
finishes = st.builds(
    Finished, st.sampled_from([FinishReason.STOP, FinishReason.LENGTH, FinishReason.CANCELLED])
) | st.builds(Finished, st.just(FinishReason.ERROR), errors)
updates = st.builds(
    Update,
    key=st.integers(0, 2**64 - 1),
    token_ids=TOKENS,
    started=st.none() | st.builds(Started, TOKEN, st.text()),
    finished=st.none() | finishes,
    logprobs=st.lists(scores, max_size=2).map(tuple),
    prompt_logprobs=st.none() | st.builds(PromptLogprobs, TOKEN, st.lists(scores, min_size=1, max_size=2).map(tuple)),
    drafts=st.none() | st.builds(VerifiedDrafts, TOKEN, TOKEN),
)


@given(requests)
def test_a_request_arrives_as_it_was_sent(request: Request) -> None:
    """A field that is forgotten on the way would silently have no effect."""
    message = request_pb2.Request.FromString(request_to_proto(request).SerializeToString())
    assert request_from_proto(message) == request


@given(updates)
def test_an_update_arrives_as_it_was_sent(update: Update) -> None:
    """The same, for what comes back."""
    arrived = update_from_proto(session_pb2.RequestUpdate.FromString(update_to_proto(update).SerializeToString()))
    if update.finished is not None and update.finished.error is not None:
        assert arrived.finished is not None and arrived.finished.error is not None
        sent, error = update.finished.error, arrived.finished.error
        assert type(error) is type(sent)
        assert (error.message, error.field, error.retry_after) == (sent.message, sent.field, sent.retry_after)
    else:
        assert arrived == update


@pytest.mark.parametrize("field", ["sampling.min_p", "sampling.seed", "stop.min_tokens", "stop.ignore_eos", "priority"])
def test_what_is_required_is_not_filled_in(field: str) -> None:
    """A peer of another version must be told, not served with defaults that it did not choose."""
    message = request_to_proto(Request("r", "m", (1,), SamplingParams(), StopConditions(1)))
    *path, name = field.split(".")
    part = message
    for step in path:
        part = getattr(part, step)
    part.ClearField(name)
    with pytest.raises(InvalidRequestError) as error:
        request_from_proto(message)
    assert error.value.field == field
