"""The work that the engine is measured with: prompts of random tokens, and how many tokens are to follow.

The same seed gives the same work everywhere: token ids come from 10 up to the vocabulary's end or 100,000, one draw of
Python's `random` each, so that other engines can be given it, too.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from quire.service.errors import ConfigError

_FIRST_TOKEN, _LAST_TOKEN = 10, 100_000


class Job(NamedTuple):
    """One request: its prompt's token ids, and exactly how many tokens follow."""

    prompt: list[int]
    output_len: int


Work = Sequence[Job]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens from `low` to `high`, both included, each as likely."""

    low: int
    high: int

    @classmethod
    def parse(cls, flag: str, text: str) -> Lengths:
        """From "128" or "100:1024". Raises ConfigError."""
        found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        lengths = cls(int(found[1]), int(found[2] or found[1])) if found else cls(0, 0)
        if not 1 <= lengths.low <= lengths.high:
            raise ConfigError(f"{flag} is {text!r}: give a number of tokens, like 128, or a range, like 100:1024")
        return lengths


class Workloads:
    """Work for a model with `vocab_size` tokens."""

    def __init__(self, vocab_size: int) -> None:
        self._end = max(min(vocab_size, _LAST_TOKEN), _FIRST_TOKEN + 1)

    def mixed(self, count: int, prompt: Lengths, output: Lengths, seed: int) -> Work:
        """`count` requests of random lengths."""
        draw = random.Random(seed)
        return [
            Job(self._tokens(draw, draw.randint(prompt.low, prompt.high)), draw.randint(output.low, output.high))
            for _ in range(count)
        ]

    def fixed(self, count: int, prompt_len: int, output_len: int, seed: int) -> Work:
        """`count` requests of one length."""
        draw = random.Random(seed)
        return [Job(self._tokens(draw, prompt_len), output_len) for _ in range(count)]

    def shared_prefix(self, count: int, prefix_len: int, suffix_len: int, output_len: int, seed: int) -> Work:
        """`count` requests whose prompts begin with the same `prefix_len` tokens."""
        draw = random.Random(seed)
        prefix = self._tokens(draw, prefix_len)
        return [Job(prefix + self._tokens(draw, suffix_len), output_len) for _ in range(count)]

    def shifted(self, work: Work, by: int) -> Work:
        """The same lengths, and the same prompts among them alike, with other tokens: no cache holds them. 0 changes
        nothing."""
        span = self._end - _FIRST_TOKEN
        return [
            Job([_FIRST_TOKEN + (token - _FIRST_TOKEN + by) % span for token in job.prompt], job.output_len)
            for job in work
        ]

    def _tokens(self, draw: random.Random, count: int) -> list[int]:
        return [draw.randrange(_FIRST_TOKEN, self._end) for _ in range(count)]


def longest(work: Work) -> int:
    """The most tokens, prompt and output together, of a request."""
    return max(len(job.prompt) + job.output_len for job in work)
