"""Grammars are asked what they force where that is of use, and elsewhere so seldom that it costs nothing."""

from __future__ import annotations

from quire.engine.speculation.forced_asks import ForcedAsks


def steps_until_next(asks: ForcedAsks) -> int:
    steps = 0
    while not asks.next():
        steps += 1
    return steps


def test_what_is_not_used_is_asked_for_less_and_less() -> None:
    """64 masks with forced tokens take nearly twice as long as without: a large batch would pay that in each step."""
    asks, pauses = ForcedAsks(16), []
    for _ in range(7):
        asks.observe(used=False)
        asks.observe(used=False)  # what is there is planned with again, until it is drawn
        pauses.append(steps_until_next(asks))
    assert pauses == [4, 8, 16, 32, 64, 64, 64]


def test_what_is_used_is_asked_for_in_each_step() -> None:
    """A batch that has become small would go on without its grammars' tokens."""
    asks = ForcedAsks(16)
    for _ in range(3):
        asks.observe(used=False)
        steps_until_next(asks)
    asks.observe(used=True)
    assert [asks.next() for _ in range(3)] == [16] * 3
    asks.observe(used=False)
    assert steps_until_next(asks) == 4


def test_nothing_is_asked_for_where_nothing_may_be_verified() -> None:
    """`num_forced` 0 turns them off."""
    assert not any(ForcedAsks(0).next() for _ in range(10))
