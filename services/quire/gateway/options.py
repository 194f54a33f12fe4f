"""What a client may choose about a generation, whichever API it came through: ranges are checked here, once."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from quire.service.errors import InvalidRequestError
from quire.service.request import (
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKENS,
    MAX_TOKEN_ID,
    Constraint,
)

MAX_STOP_STRINGS = 16
MAX_CHOICES = 128


class Range(NamedTuple):
    """What a number must lie in; `low_open`: above `low`."""

    low: float
    high: float
    low_open: bool = False

    def __str__(self) -> str:
        return f"{'(' if self.low_open else '['}{self.low}, {self.high}]"


# By the field's name in every API.
RANGES: Mapping[str, Range] = {
    "n": Range(1, MAX_CHOICES),
    "max_tokens": Range(1, MAX_TOKEN_ID),
    "min_tokens": Range(0, MAX_TOKEN_ID),
    "temperature": Range(0, 2),
    "top_p": Range(0, 1, low_open=True),
    "top_k": Range(-1, MAX_TOKEN_ID),
    "min_p": Range(0, 1),
    "seed": Range(-(2**63), 2**64 - 1),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "repetition_penalty": Range(0, 100, low_open=True),
    "priority": Range(-(2**31), 2**31 - 1),
    "logprobs": Range(0, MAX_LOGPROBS),
    "prompt_logprobs": Range(0, MAX_LOGPROBS),
}


@dataclass(frozen=True, slots=True)
class Options:
    """None stands for the default of the OpenAI API. Raises InvalidRequestError with the field's bare name.

    n: outputs per prompt; output i draws with seed + i.
    max_tokens: default is the room left in the context for a chat, 16 for a completion. With `echo` it may be 0.
    seed: any 64-bit integer, signed or unsigned; drawn at random if absent.
    stop: strings that end the output and are not part of it.
    constraint_field: what the client calls the constraint, for errors about it.
    logprobs, prompt_logprobs: how many of the most likely tokens to report beside each token; None: nothing.
    echo: the prompt's text comes before the output's, and its tokens' log-probabilities if there are any.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    constraint: Constraint | None = None
    constraint_field: str = "constraint"
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    priority: int = 0
    cache_salt: str = ""

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            if not (name == "max_tokens" and self.echo and self.max_tokens == 0):
                _check_range(name, getattr(self, name), allowed)
        _check_size("stop", self.stop, MAX_STOP_STRINGS)
        _check_size("bad_words", self.bad_words, MAX_BAD_WORDS)
        _check_size("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS)
        _check_size("logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
        for name, texts in (("stop", self.stop), ("bad_words", self.bad_words)):
            if not all(texts):
                raise InvalidRequestError(f"{name} holds an empty string: remove it", field=name)
        for token_id, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                raise InvalidRequestError(
                    f"logit_bias of token {token_id} is {bias}: it must lie in [-100, 100]", field="logit_bias"
                )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}: set it to at most that",
                field="min_tokens",
            )
        if self.ignore_eos and self.constraint is not None:
            raise InvalidRequestError(
                f"ignore_eos is set and so is {self.constraint_field}, whose end is the model's end token: leave one "
                "of them out",
                field="ignore_eos",
            )


def _check_range(name: str, value: float | None, allowed: Range) -> None:
    if value is None:
        return
    # The contract carries 32 bits, in which what is barely above 0 is 0.
    low_reached = _as_sent(value) > allowed.low if allowed.low_open else value >= allowed.low
    if not (low_reached and value <= allowed.high and math.isfinite(value)):
        raise InvalidRequestError(f"{name} is {value}: it must lie in {allowed}", field=name)


def _as_sent(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0] if abs(value) < 1 else value


def _check_size(name: str, values: tuple[object, ...], limit: int) -> None:
    if len(values) > limit:
        raise InvalidRequestError(f"{name} has {len(values)} entries: give at most {limit}", field=name)
