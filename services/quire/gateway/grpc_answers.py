"""What the core says, in the public contract's messages."""

from __future__ import annotations

from collections.abc import Sequence

from quire.gateway.answer import Answer
from quire.gateway.deltas import Delta, Reasoning, Score, Scores, ToolCallArguments, ToolCallStart
from quire.gateway.output import Generation
from quire.gateway.stream import Result, Usage
from quire.service.text import Pieces
from quire.v1 import inference_pb2, request_pb2


def choice(output: Answer, result: Result, pieces: Pieces) -> inference_pb2.Choice:
    """One whole output."""
    calls = [inference_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in output.calls]
    return inference_pb2.Choice(
        text=output.text,
        finish_reason=finish_reason(result),
        reasoning=output.reasoning,
        tool_calls=calls,
        logprobs=logprobs(output.scores, pieces),
    )


def prompt_logprobs(generation: Generation, result: Result, pieces: Pieces) -> list[inference_pb2.TokenLogprob]:
    """Those of a prompt's tokens but the first, if they were asked for."""
    token_ids = generation.request.prompt_token_ids
    found = result.prompt_logprobs or ()
    scores = [Score(token_id, 0, place) for token_id, place in zip(token_ids, found, strict=False)]
    return logprobs(scores, pieces)


def put(message: inference_pb2.GenerateStreamResponse, delta: Delta, pieces: Pieces) -> None:
    """Adds `delta` to what a message of a stream says."""
    match delta:
        case str():
            message.text = delta
        case Reasoning(text):
            message.reasoning = text
        case ToolCallStart(index, call_id, name):
            message.tool_calls.add(index=index, id=call_id, name=name)
        case ToolCallArguments(index, text):
            message.tool_calls.add(index=index, arguments=text)
        case Scores(tokens):
            message.logprobs.extend(logprobs(tokens, pieces))


def logprobs(scores: Sequence[Score], pieces: Pieces) -> list[inference_pb2.TokenLogprob]:
    """Tokens with their log-probabilities."""
    return [
        inference_pb2.TokenLogprob(
            token_id=score.token_id,
            token=pieces.shown(score.token_id),
            logprob=score.logprobs.logprob,
            rank=score.logprobs.rank,
            top=[
                inference_pb2.TopLogprob(token_id=token_id, token=pieces.shown(token_id), logprob=logprob)
                for token_id, logprob in score.logprobs.top
            ],
        )
        for score in scores
        if score.logprobs is not None
    ]


def finish_reason(result: Result) -> request_pb2.FinishReason.ValueType:
    """How an output ended."""
    return request_pb2.FinishReason.Value(f"FINISH_REASON_{result.finish_reason.value}")


def usage(total: Usage) -> inference_pb2.Usage:
    """In tokens."""
    return inference_pb2.Usage(
        prompt_tokens=total.prompt_tokens,
        cached_tokens=total.cached_tokens,
        completion_tokens=total.completion_tokens,
        accepted_prediction_tokens=total.accepted_prediction_tokens,
        rejected_prediction_tokens=total.rejected_prediction_tokens,
    )
