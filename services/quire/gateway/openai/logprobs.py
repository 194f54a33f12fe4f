"""Log-probabilities in OpenAI's two shapes and in vLLM's third. `responses` puts them into answers and events."""

from __future__ import annotations

from collections.abc import Sequence

from quire.gateway.deltas import Score
from quire.gateway.openai.answers import (
    ChatLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
)
from quire.service.request import TokenLogprobs
from quire.service.text import Pieces

# What JSON can't carry, minus infinity, and all that is as good as that.
_LOWEST = -9999.0


def token_text(raw: bytes) -> str:
    """A token as text. One that is no whole characters is spelled `bytes:\\xf0\\x9f`, as OpenAI does."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(scores: Sequence[Score], pieces: Pieces) -> ChatLogprobs:
    """Those of a chat's choice or of one event."""
    content = []
    for score in scores:
        if (logprobs := score.logprobs) is not None:
            top = [_top(token_id, logprob, pieces) for token_id, logprob in logprobs.top]
            own = _top(score.token_id, logprobs.logprob, pieces)
            content.append(TokenLogprob(own.token, own.logprob, own.bytes, top))
    return ChatLogprobs(content)


def text_logprobs(scores: Sequence[Score], pieces: Pieces) -> TextLogprobs:
    """Those of a completion's choice or of one event; a token's own is among its most likely ones in any case."""
    shape = TextLogprobs([], [], [], [])
    for score in scores:
        own = token_text(pieces.shown(score.token_id))
        shape.tokens.append(own)
        shape.text_offset.append(score.offset)
        logprobs = score.logprobs
        if logprobs is None:
            shape.token_logprobs.append(None)
            shape.top_logprobs.append(None)
            continue
        shape.token_logprobs.append(_finite(logprobs.logprob))
        top = {token_text(pieces.shown(token_id)): _finite(logprob) for token_id, logprob in logprobs.top}
        shape.top_logprobs.append(top | {own: _finite(logprobs.logprob)})
    return shape


def prompt_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], pieces: Pieces
) -> PromptLogprobs:
    """Those of each prompt token: its own, and the most likely ones at its place by rank."""
    places: PromptLogprobs = []
    for token_id, place in zip(token_ids, logprobs, strict=True):
        if place is None:
            places.append(None)
            continue
        ranked = {
            str(other): _ranked(other, logprob, rank, pieces) for rank, (other, logprob) in enumerate(place.top, 1)
        }
        own = _ranked(token_id, place.logprob, place.rank, pieces)
        places.append({**ranked, str(token_id): own})
    return places


def _ranked(token_id: int, logprob: float, rank: int, pieces: Pieces) -> PromptLogprob:
    return PromptLogprob(_finite(logprob), rank, token_text(pieces.shown(token_id)))


def _top(token_id: int, logprob: float, pieces: Pieces) -> TopLogprob:
    raw = pieces.shown(token_id)
    return TopLogprob(token_text(raw), _finite(logprob), list(raw))


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
