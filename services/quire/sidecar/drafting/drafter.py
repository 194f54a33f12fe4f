"""Proposes what may follow in each sequence. Called by the sidecar's server and, in process, by the offline API."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from quire.sidecar.drafting.automaton import ROOT, SuffixAutomaton

# A match that begins further back is as good as one that begins here.
_LOOK_BACK = 64

# Stands between two outputs and is no token, so that no match spans both.
_BORDER = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class DraftingLimits:
    """What is remembered, in tokens: of one sequence, and of the ended outputs of each of `tenants` tenants.

    Ends that are shorter than `shortest_match` tokens occur everywhere and say nothing of what follows.
    """

    sequence_tokens: int = 32_768
    tenant_tokens: int = 65_536
    tenants: int = 64
    shortest_match: int = 3


@dataclass(slots=True)
class _Recent:
    """The ended outputs of a tenant. `generation` counts how often the oldest were dropped, which starts it anew."""

    automaton: SuffixAutomaton = field(default_factory=SuffixAutomaton)
    generation: int = 0


@dataclass(slots=True)
class _History:
    """One sequence: its own text, and how far the end of it occurs in what its tenant's others said."""

    tenant: str
    num_prompt_tokens: int
    own: SuffixAutomaton = field(default_factory=SuffixAutomaton)
    own_match: tuple[int, int] = (0, 0)
    state: int = ROOT
    length: int = 0
    generation: int = -1


class Drafter:
    """Knows the sequences of one engine. What one tenant's requests said is never proposed to another's."""

    def __init__(self, limits: DraftingLimits) -> None:
        self._limits = limits
        self._histories: dict[int, _History] = {}
        self._recent: OrderedDict[str, _Recent] = OrderedDict()

    def start(self, sequence: int, tenant: str, num_prompt_tokens: int) -> None:
        """A sequence whose first `num_prompt_tokens` tokens are a prompt; replaces one of the same name."""
        self._histories[sequence] = _History(tenant, num_prompt_tokens)

    def draft(self, sequence: int, token_ids: Sequence[int], num_tokens: int) -> tuple[int, ...]:
        """Takes in what is new of a sequence and proposes up to `num_tokens` tokens that may follow; raises KeyError if
        it was not started."""
        history, limits = self._histories[sequence], self._limits
        if len(history.own) + len(token_ids) > limits.sequence_tokens:
            # Goes on with what comes: a new text is all that is remembered then.
            history.own, history.num_prompt_tokens = SuffixAutomaton(), 0
            token_ids = token_ids[-limits.sequence_tokens :]
        if token_ids:
            history.own_match = history.own.extend(token_ids)
        self._match_recent(history, token_ids)
        return self._best(history, num_tokens)

    def release(self, sequence: int) -> None:
        """A sequence has ended: its output is remembered for its tenant. No effect if it is not known."""
        history = self._histories.pop(sequence, None)
        if history is None:
            return
        output = history.own.text[history.num_prompt_tokens :]
        recent = self._recent.setdefault(history.tenant, _Recent())
        self._recent.move_to_end(history.tenant)
        if len(recent.automaton) + len(output) >= self._limits.tenant_tokens:
            kept = recent.automaton.text[-self._limits.tenant_tokens // 2 :]
            recent.automaton, recent.generation = SuffixAutomaton(), recent.generation + 1
            recent.automaton.extend(kept)
            output = output[-self._limits.tenant_tokens // 2 + 1 :]
        recent.automaton.extend((*output, _BORDER))
        while len(self._recent) > self._limits.tenants:
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
