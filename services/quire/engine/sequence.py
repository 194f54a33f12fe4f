"""A request inside the engine: its tokens, its block table, how far it is computed."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from enum import Enum, auto

from quire.engine.speculation.drafts import Drafter
from quire.service.pages import PAGE_SIZE, next_hash, prefix_hashes, root_hash
from quire.service.request import FinishReason, Request

# A draft that the device has made, or is making, and the host has not read yet.
UNKNOWN = -1


class SequenceState(Enum):
    """Where a sequence is. A preempted one is WAITING again, at its old place in the order."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """`token_ids` is prompt and output, as far as the host knows it; steps in flight draw `num_drawn` tokens more, and
    as many again as they keep of the `num_open` drafts that they verify.

    The keys and values of the first `num_computed` tokens, and of drafts that are kept, lie in `block_table`'s pages
    once the steps in flight are done. `max_tokens` is how many tokens there may be in all. `page_hashes` has a hash for
    every full page of `token_ids`; the first `num_published` of them are in the pool. `arrived_at` and `last_token_at`
    (when a token was last drawn here) are the core's, in seconds of a clock of its own.
    `drafts`, made by `drafter`, may be what follows all tokens that there are: the next step is to find out. `siblings`
    are second choices beside the first of them. Those that only the device knows are UNKNOWN. `num_wanted` is how many
    drafts the device is to make of what comes after that.
    The log-probabilities of the first `num_scored` prompt tokens are reported or on their way; the first has none.
    """

    key: int
    request: Request
    arrival: int
    eos_token_ids: InitVar[frozenset[int]]
    max_model_len: InitVar[int]
    end_token_ids: frozenset[int] = field(init=False)
    token_ids: list[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    max_tokens: int = field(init=False)
    state: SequenceState = SequenceState.WAITING
    slot: int = -1
    num_computed: int = 0
    num_drawn: int = 0
    num_open: int = 0
    block_table: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    started: bool = False
    num_preemptions: int = 0
    num_scored: int = 1
    drafts: tuple[int, ...] = ()
    siblings: tuple[int, ...] = ()
    drafter: Drafter | None = None
    num_wanted: int = 0
    arrived_at: float = 0.0
    last_token_at: float | None = None

    def __post_init__(self, eos_token_ids: frozenset[int], max_model_len: int) -> None:
        stop = self.request.stop
        self.end_token_ids = (frozenset() if stop.ignore_eos else eos_token_ids).union(stop.stop_token_ids)
        self.token_ids = [*self.request.prompt_token_ids, *self.request.output_token_ids]
        self.num_prompt_tokens = len(self.request.prompt_token_ids)
        self.max_tokens = min(self.num_prompt_tokens + stop.max_tokens, max_model_len)
        self.page_hashes = prefix_hashes(self.request.cache_key, self.token_ids)

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: higher priority, then earlier arrival."""
        return (-self.request.priority, self.arrival)

    @property
    def num_tokens(self) -> int:
        """All tokens that there are, those of steps in flight included."""
        return len(self.token_ids) + self.num_drawn

    @property
    def num_pending(self) -> int:
        """Tokens still to be computed before the next one can be sampled; 1 while decoding."""
        return len(self.token_ids) + self.num_drawn - self.num_computed

    @property
    def num_verified(self) -> int:
        """Rows of the next step that `drafts` and `siblings` take."""
        return len(self.drafts) + len(self.siblings)

    @property
    def reach(self) -> int:
        """Up to which position, and not with it, steps in flight may write keys and values that count."""
        return self.num_computed + self.num_open

    @property
    def awaits_last_token(self) -> bool:
        """Whether the last token that it may have is drawn by a step in flight."""
        return len(self.token_ids) + self.num_drawn >= self.max_tokens

    @property
    def may_await_last_token(self) -> bool:
        """Whether it is, if all drafts that are verified are kept."""
        return len(self.token_ids) + self.num_drawn + self.num_open >= self.max_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of prompt tokens are still wanted: their logits have to be computed then."""
        return self.request.prompt_logprobs is not None and self.num_scored < self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """What was generated so far, elsewhere included."""
        return self.token_ids[self.num_prompt_tokens :]

    def append(self, token_id: int) -> None:
        """Adds the oldest token that a step in flight has drawn, and the hash of the page that it fills."""
        self.num_drawn -= 1
        self.token_ids.append(token_id)
        if len(self.token_ids) % PAGE_SIZE == 0:
            parent = self.page_hashes[-1] if self.page_hashes else root_hash(self.request.cache_key)
            self.page_hashes.append(next_hash(parent, self.token_ids[-PAGE_SIZE:]))

    def extend(self, token_ids: tuple[int, ...]) -> bool:
        """Adds all that a step in flight has drawn, unless one of them may end the output; returns whether it did."""
        before = len(self.token_ids)
        after = before + len(token_ids)
        if after >= self.max_tokens or not self.end_token_ids.isdisjoint(token_ids):
            return False
        if before // PAGE_SIZE == after // PAGE_SIZE:
            self.num_drawn -= len(token_ids)
            self.token_ids.extend(token_ids)
        else:
            for token_id in token_ids:
                self.append(token_id)
        return True

    def finish_reason(self) -> FinishReason | None:
        """Whether the last token ended the output, and how."""
        if self.token_ids[-1] in self.end_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.token_ids) >= self.max_tokens else None


def pages_for(num_tokens: int) -> int:
    """How many pages hold `num_tokens` tokens."""
    return -(-num_tokens // PAGE_SIZE)
