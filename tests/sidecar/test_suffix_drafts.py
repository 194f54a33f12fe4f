"""Drafts from what was said before: the automaton against a search by hand, and what is remembered for whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.sidecar.drafting.automaton import ROOT, SuffixAutomaton
from quire.sidecar.drafting.drafter import Drafter, DraftingLimits

TEXTS = st.lists(st.integers(0, 3), max_size=60)


def occurs(pattern: list[int], text: list[int]) -> list[int]:
    """Where `pattern` ends in `text`."""
    size = len(pattern)
    return [end for end in range(size, len(text) + 1) if text[end - size : end] == pattern]


@given(text=TEXTS)
def test_the_longest_end_that_occurred_before(text: list[int]) -> None:
    """A shorter match than there is would draft what follows in a worse place; a false one would draft nonsense."""
    automaton = SuffixAutomaton()
    for count, token in enumerate(text, 1):
        length, end = automaton.extend([token])
        seen = text[:count]
        longest = max(size for size in range(count) if size == 0 or occurs(seen[-size:], seen[:-1]))
        assert length == longest
        assert length == 0 or end in occurs(seen[-length:], seen[:-1])


@given(text=TEXTS, other=TEXTS)
def test_the_longest_end_of_another_text(text: list[int], other: list[int]) -> None:
    """This is how a sequence finds itself in what others said."""
    automaton = SuffixAutomaton()
    automaton.extend(text)
    state, length = ROOT, 0
    for count, token in enumerate(other, 1):
        state, length = automaton.advance(state, length, token)
        seen = other[:count]
        assert length == max(size for size in range(count + 1) if size == 0 or occurs(seen[-size:], text))
        assert length == 0 or automaton.end_of(state) in occurs(seen[-length:], text)


def test_memory_of_a_long_text() -> None:
    """256 sequences of some thousand tokens are in a sidecar beside an engine: each must be small."""
    import random
    import tracemalloc

    numbers = random.Random(0)
    words = [[numbers.randrange(50_000) for _ in range(numbers.randrange(1, 12))] for _ in range(500)]
    text = [token for _ in range(1500) for token in numbers.choice(words)]
    tracemalloc.start()
    automaton = SuffixAutomaton()
    automaton.extend(text)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 150 * len(text)


def read(drafter: Drafter) -> None:
    """Lets it read all that it was told."""
    while drafter.catch_up():
        pass


def drafted(drafter: Drafter, sequence: int, text: list[int], num_tokens: int = 4) -> tuple[int, ...]:
    return drafter.draft(sequence, text, num_tokens)


def test_what_followed_before_is_proposed() -> None:
    """The prompt's own words are what answers repeat most: code that is edited, documents that are quoted."""
    drafter = Drafter(DraftingLimits())
    drafter.start(1, "", 8)
    assert drafted(drafter, 1, [1, 2, 3, 4, 5, 6, 7, 8]) == ()
    assert drafted(drafter, 1, [2, 3]) == ()
    assert drafted(drafter, 1, [4]) == (5, 6, 7)
    # A longer match is trusted for longer.
    assert drafted(drafter, 1, [5]) == (6, 7, 8, 2)


def test_what_its_tenants_others_said_is_proposed_and_nobody_elses() -> None:
    """A tenant's text in another's drafts could be told from how fast its answers come."""
    drafter = Drafter(DraftingLimits())
    drafter.start(1, "a", 2)
    drafter.draft(1, [100, 101, 7, 8, 9, 10, 11, 12], 0)
    drafter.release(1)
    read(drafter)
    drafter.start(2, "a", 1)
    assert drafted(drafter, 2, [50, 7, 8, 9]) == (10, 11, 12)
    drafter.start(3, "b", 1)
    assert drafted(drafter, 3, [50, 7, 8, 9]) == ()
    # Prompts are not what was said.
    drafter.start(4, "a", 1)
    assert drafted(drafter, 4, [60, 99, 100, 101]) == ()


@pytest.mark.parametrize("outputs", [3, 40])
def test_what_is_remembered_is_bounded(outputs: int) -> None:
    """A pod runs for months."""
    limits = DraftingLimits(sequence_tokens=64, tenant_tokens=100, tenants=2)
    drafter = Drafter(limits)
    for index in range(outputs):
        drafter.start(index, f"tenant {index % 4}", 1)
        for start in range(0, 200, 10):
            drafter.draft(index, [index * 1000 + start + i for i in range(10)], 4)
            assert len(drafter._histories[index].own) <= 64
        drafter.release(index)
        read(drafter)
        assert len(drafter._recent) <= 2
        assert all(len(recent.automaton) <= 100 for recent in drafter._recent.values())
    assert not drafter._histories
    # The newest output is still of use.
    drafter.start(-1, f"tenant {(outputs - 1) % 4}", 1)
    last = (outputs - 1) * 1000
    assert drafted(drafter, -1, [1, last + 190, last + 191, last + 192]) == (last + 193, last + 194, last + 195)


def test_a_match_survives_that_the_oldest_are_dropped() -> None:
    """The automaton is made anew then: states of the old one mean other substrings in it."""
    drafter = Drafter(DraftingLimits(tenant_tokens=20))
    drafter.start(1, "", 0)
    drafter.draft(1, list(range(100, 115)), 0)
    drafter.release(1)
    read(drafter)
    drafter.start(2, "", 0)
    assert drafted(drafter, 2, [110, 111, 112]) == (113, 114)
    drafter.start(3, "", 0)
    drafter.draft(3, list(range(200, 215)), 0)
    drafter.release(3)
    read(drafter)
    assert drafted(drafter, 2, [113]) in ((114,), ())
    drafter.start(4, "", 0)
    assert drafted(drafter, 4, [206, 207, 208]) == (209, 210, 211)
