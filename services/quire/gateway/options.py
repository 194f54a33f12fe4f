"""What a client may choose about a generation, whichever API it came through: ranges are checked here, once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quire.service.errors import InvalidRequestError
from quire.service.request import MAX_TOKEN_ID, Constraint

MAX_STOP_STRINGS = 16


@dataclass(frozen=True, slots=True)
class Options:
    """None stands for the default of the OpenAI API. Raises InvalidRequestError with the field's bare name.

    max_tokens: default is the room left in the context for a chat, 16 for a completion.
    seed: any 64-bit integer, signed or unsigned; drawn at random if absent.
    stop: strings that end the output and are not part of it.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None
    priority: int = 0
    cache_salt: str = ""

    def __post_init__(self) -> None:
        _check_range("max_tokens", self.max_tokens, 1, MAX_TOKEN_ID)
        _check_range("temperature", self.temperature, 0, 2)
        _check_range("top_p", self.top_p, 0, 1, low_open=True)
        _check_range("top_k", self.top_k, 0, MAX_TOKEN_ID)
        _check_range("seed", self.seed, -(2**63), 2**64 - 1)
        _check_range("priority", self.priority, -(2**31), 2**31 - 1)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                f"stop holds {len(self.stop)} strings: give at most {MAX_STOP_STRINGS}", field="stop"
            )
        if not all(self.stop):
            raise InvalidRequestError("stop holds an empty string: remove it", field="stop")


def _check_range(name: str, value: float | None, low: float, high: float, *, low_open: bool = False) -> None:
    if value is None or (low <= value <= high and math.isfinite(value) and not (low_open and value == low)):
        return
    interval = f"{'(' if low_open else '['}{low}, {high}]"
    raise InvalidRequestError(f"{name} is {value}: it must lie in {interval}", field=name)
