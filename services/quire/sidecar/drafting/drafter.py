"""Proposes what may follow in each sequence. Called by the sidecar's server and, in process, by the offline API.

Both have something else to do in the same interpreter, masks or a model, and a long text takes tens of milliseconds to
read: more than some tokens at once are read in `catch_up`, a bit at a time.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from quire.service.errors import ConfigError
from quire.sidecar.drafting.automaton import ROOT, SuffixAutomaton

# A match that begins further back is as good as one that begins here.
_LOOK_BACK = 64

# What is read at once: half a millisecond's work.
_AT_ONCE = 128

# Stands between two outputs and is no token, so that no match spans both.
_BORDER = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class DraftingLimits:
    """What is remembered, in tokens of 100 to 150 bytes: of one sequence, of the ended outputs of each of `tenants`
    tenants, and in all: `total_tokens` of sequences and as many of ended outputs.

    Ends that are shorter than `shortest_match` tokens occur everywhere and say nothing of what follows.
    """

    sequence_tokens: int = 32_768
    tenant_tokens: int = 65_536
    total_tokens: int = 524_288
    tenants: int = 64
    shortest_match: int = 3

    def __post_init__(self) -> None:
        for name in ("sequence_tokens", "tenant_tokens", "total_tokens"):
            if getattr(self, name) < 16:
                flag = f"--drafting-{name.replace('_', '-')}"
                raise ConfigError(f"{flag} is {getattr(self, name)}: give at least 16", field=f"drafting_{name}")


@dataclass(slots=True)
class _Recent:
    """The ended outputs of a tenant. `generation` counts how often the oldest were dropped, which starts it anew."""

    automaton: SuffixAutomaton = field(default_factory=SuffixAutomaton)
    generation: int = 0


@dataclass(slots=True)
class _History:
    """One sequence: its own text, and how far the end of it occurs in what its tenant's others said.

    `unread` was told and is still to be read. One that found no room is `left_out`.
    """

    tenant: str
    num_prompt_tokens: int
    own: SuffixAutomaton = field(default_factory=SuffixAutomaton)
    own_match: tuple[int, int] = (0, 0)
    state: int = ROOT
    length: int = 0
    generation: int = -1
    unread: array[int] = field(default_factory=lambda: array("I"))
    left_out: bool = False

    def __len__(self) -> int:
        return len(self.own) + len(self.unread)


@dataclass(slots=True)
class _Ended:
    """Tokens that a tenant's sequence said, to be read from `start` on; `whole` if its output ends with them."""

    tenant: str
    tokens: array[int]
    whole: bool = True
    start: int = 0

    def __len__(self) -> int:
        return len(self.tokens) - self.start


class Drafter:
    """Knows the sequences of one engine. What one tenant's requests said is never proposed to another's."""

    def __init__(self, limits: DraftingLimits) -> None:
        self._limits = limits
        self._at_once = min(_AT_ONCE, limits.sequence_tokens, limits.tenant_tokens // 4)
        self._histories: dict[int, _History] = {}
        self._recent: OrderedDict[str, _Recent] = OrderedDict()
        self._num_tokens = 0
        # Sequences with more to read than is read at once; who was last had its turn last.
        self._behind: dict[int, None] = {}
        self._ended: deque[_Ended] = deque()
        self._num_ended_tokens = 0

    def __len__(self) -> int:
        """How many sequences there are."""
        return len(self._histories)

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._histories

    def start(self, sequence: int, tenant: str, num_prompt_tokens: int) -> None:
        """A sequence whose first `num_prompt_tokens` tokens are a prompt; replaces one of the same name."""
        self._forget(sequence)
        self._histories[sequence] = _History(tenant, num_prompt_tokens)

    def draft(self, sequence: int, token_ids: Iterable[int], num_tokens: int) -> tuple[int, ...]:
        """Is told what is new of a sequence and proposes up to `num_tokens` tokens that may follow, none while there is
        more to read than can be at once; raises KeyError if it was not started."""
        history = self._histories[sequence]
        if history.left_out:
            return ()
        before = len(history.unread)
        history.unread.extend(token_ids)
        self._num_tokens += len(history.unread) - before
        if self._num_tokens > self._limits.total_tokens:
            self._forget(sequence)
            self._histories[sequence] = _History(history.tenant, 0, left_out=True)
            return ()
        if len(history.unread) > self._at_once:
            self._behind[sequence] = None
            return ()
        self._behind.pop(sequence, None)
        self._read(history)
        return self._best(history, num_tokens)

    def release(self, sequence: int) -> None:
        """A sequence has ended: its output is remembered for its tenant. No effect if it is not known."""
        history = self._forget(sequence)
        if history is None:
            return
        told = history.own.text + history.unread
        self._remember(_Ended(history.tenant, told[history.num_prompt_tokens :][-self._limits.tenant_tokens // 2 :]))

    def catch_up(self) -> bool:
        """Reads a bit of what is still to be read, in about half a millisecond; returns whether there is more."""
        if self._behind:
            sequence = next(iter(self._behind))
            del self._behind[sequence]
            history = self._histories[sequence]
            self._read(history)
            if history.unread:
                self._behind[sequence] = None
        elif self._ended:
            self._learn()
        return bool(self._behind or self._ended)

    def _forget(self, sequence: int) -> _History | None:
        history = self._histories.pop(sequence, None)
        if history is not None:
            self._behind.pop(sequence, None)
            self._num_tokens -= len(history)
        return history

    def _read(self, history: _History) -> None:
        token_ids = history.unread[: self._at_once]
        del history.unread[: self._at_once]
        if len(history.own) + len(token_ids) > self._limits.sequence_tokens:
            # Goes on with what comes: a new text is all that is remembered then.
            self._num_tokens -= len(history.own)
            history.num_prompt_tokens = max(0, history.num_prompt_tokens - len(history.own))
            history.own, history.own_match = SuffixAutomaton(), (0, 0)
        if token_ids:
            history.own_match = history.own.extend(token_ids)
        self._match_recent(history, token_ids)

    def _remember(self, ended: _Ended) -> None:
        if not ended:
            return
        self._ended.append(ended)
        self._num_ended_tokens += len(ended)
        while self._num_ended_tokens > self._limits.total_tokens:
            self._num_ended_tokens -= len(self._ended.popleft())

    def _learn(self) -> None:
        """Reads on in the oldest of the ended outputs."""
        ended, limits = self._ended[0], self._limits
        recent = self._recent.setdefault(ended.tenant, _Recent())
        self._recent.move_to_end(ended.tenant)
        if len(recent.automaton) + self._at_once >= limits.tenant_tokens:
            kept = recent.automaton.text[-limits.tenant_tokens // 2 :]
            recent.automaton, recent.generation = SuffixAutomaton(), recent.generation + 1
            self._ended.appendleft(_Ended(ended.tenant, kept, whole=False))
            self._num_ended_tokens += len(kept)
            return
        tokens = ended.tokens[ended.start : ended.start + self._at_once]
        recent.automaton.extend(tokens)
        ended.start += len(tokens)
        self._num_ended_tokens -= len(tokens)
        if not ended:
            self._ended.popleft()
            if ended.whole:
                recent.automaton.extend((_BORDER,))
        while len(self._recent) > 1 and (
            len(self._recent) > limits.tenants
            or sum(len(other.automaton) for other in self._recent.values()) > limits.total_tokens
        ):
            self._recent.popitem(last=False)

    def _match_recent(self, history: _History, token_ids: Sequence[int]) -> None:
        recent = self._recent.get(history.tenant)
        if recent is None:
            history.state, history.length = ROOT, 0
            return
        if history.generation != recent.generation:
            history.generation, history.state, history.length = recent.generation, ROOT, 0
            token_ids = history.own.text[-_LOOK_BACK:]
        for token in token_ids:
            history.state, history.length = recent.automaton.advance(history.state, history.length, token)

    def _best(self, history: _History, num_tokens: int) -> tuple[int, ...]:
        """What followed the longest match; where there are two of them, the sequence's own."""
        length, end = history.own_match
        text = history.own.text
        recent = self._recent.get(history.tenant)
        if recent is not None and history.length > length:
            length, end, text = history.length, recent.automaton.end_of(history.state), recent.automaton.text
        if length < self._limits.shortest_match:
            return ()
        # A longer match is followed for longer: past its own length few drafts are kept.
        return tuple(takewhile(lambda token: token != _BORDER, text[end : end + min(num_tokens, length)]))
