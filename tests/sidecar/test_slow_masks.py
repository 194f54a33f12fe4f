"""Grammars that compile and then cost too much, mask by mask: they end, the batch and other streams go on."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from sidecar_process import DEADLINE, Row, SidecarProcess, StepClient, lark, regex

from quire.service.checkpoint import TextModel
from quire.service.errors import ErrorCode, InvalidRequestError, OverloadedError, QuireError
from quire.service.request import ConstraintKind
from quire.sidecar.config import MaskLimits
from quire.sidecar.grammar.batch import MaskRow
from quire.sidecar.grammar.compiled import Lexer
from quire.sidecar.grammar.fill import MaskFiller
from quire.sidecar.grammar.matcher import RowResult, SequenceMatcher

# Each token is one more that any of the ones before it may be joined with: masks take longer and longer.
AMBIGUOUS = lark('start: a\na: a a | a a a | "x" | ')
DIGITS = regex("[0-9]+")
_LONGEST_GAP_S = 0.05
_ATTEMPTS = 8


def test_a_grammar_that_slows_down_ends_and_its_batch_goes_on(stream: StepClient, smollm: TextModel) -> None:
    """One request would slow its engine to a crawl, for as long as it likes."""
    x, one = (smollm.tokenizer.token_to_id(token) for token in ("x", "1"))
    errors = stream.fill(Row(1, DIGITS), Row(2, AMBIGUOUS))
    count = 0
    while not errors:
        errors = stream.fill(Row(1, accepted=[one]), Row(2, accepted=[x]))
        assert one in stream.allowed(0)
        count += 1
        assert count < 2000
    assert list(errors) == [2]
    assert errors[2].code is ErrorCode.INVALID_ARGUMENT
    assert errors[2].field == "constraint.lark"
    assert "constraint.lark can't be followed any further: " in errors[2].message
    assert not stream.fill(Row(1, accepted=[one]))


def test_other_streams_do_not_wait_for_slow_masks(
    sidecar: SidecarProcess, stream: StepClient, smollm: TextModel, tmp_path: Path
) -> None:
    """Engines that share a sidecar would stall each other."""
    x, one = (smollm.tokenizer.token_to_id(token) for token in ("x", "1"))
    slowest = []
    for attempt in range(_ATTEMPTS):
        other = StepClient(sidecar.address, tmp_path, smollm.vocab_size)
        ended = threading.Thread(target=until_error, args=(other, attempt, x))
        assert not stream.fill(Row(attempt, DIGITS))
        ended.start()
        slowest.append(0.0)
        while ended.is_alive():
            before = time.monotonic()
            assert not stream.fill(Row(attempt, accepted=[one]))
            slowest[-1] = max(slowest[-1], time.monotonic() - before)
            ended.join(0.002)
        other.close()
        if slowest[-1] < _LONGEST_GAP_S:
            return
    raise AssertionError(f"masks were late in each attempt: {slowest}")


def until_error(client: StepClient, sequence: int, token: int) -> None:
    errors = client.fill(Row(sequence, AMBIGUOUS))
    while not errors:
        errors = client.fill(Row(sequence, accepted=[token]))


def test_a_full_lexer_is_replaced(stream: StepClient, smollm: TextModel) -> None:
    """What some requests draw would make a grammar fail for all who send it later, until the sidecar is restarted."""
    constraint = regex("(?s:.*a.{200})")
    ends = set(smollm.eos_token_ids)
    for sequence in range(6):
        rng, accepted = random.Random(sequence), []
        for count in range(250):
            assert not stream.fill(Row(sequence, None if count else constraint, accepted)), (sequence, count)
            accepted = [int(rng.choice([token for token in stream.allowed()[::97] if token not in ends]))]
        stream.fill(released=[sequence])


def new_lexer() -> Lexer:
    return Lexer(lambda: pytest.fail("it has no grammar"))


class StuckMatcher(SequenceMatcher):
    """A sequence whose mask takes as long as `until` says."""

    def __init__(self, until: Callable[[], object], seconds: float = 0.0, lexer: Lexer | None = None) -> None:
        self.error: QuireError | None = None
        self.seconds = seconds
        self.until = until
        self.lexer = lexer or new_lexer()

    @property
    def is_quick(self) -> bool:
        return False

    @property
    def kind(self) -> ConstraintKind:
        return ConstraintKind.LARK

    def fill(
        self, accepted: Sequence[int], drafts: Sequence[int], max_forced: int, masks: npt.NDArray[np.int32]
    ) -> RowResult:
        self.until()
        masks[0] = 7
        return RowResult()


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def rows(*untils: Callable[[], object]) -> list[MaskRow]:
    return [MaskRow(index, index, StuckMatcher(until), []) for index, until in enumerate(untils)]


def at_once() -> None:
    return None


def test_masks_that_take_for_ever_cost_their_time_and_no_more(release: threading.Event) -> None:
    """A bug in the grammar engine would hold up all requests of a pod for good."""
    filler = MaskFiller(2, MaskLimits(row_seconds=0.5, step_seconds=30.0))
    bitmask = np.zeros((8, 4), np.int32)
    stuck = [lambda: release.wait(DEADLINE)] * 4
    before = time.monotonic()
    filled = filler.fill(rows(*stuck, at_once, at_once), bitmask)
    # Two threads, four stuck rows, and the two behind them had their turn all the same.
    assert 1.0 <= time.monotonic() - before < 10
    assert sorted(filled.errors) == [0, 1, 2, 3]
    assert sorted(filled.results) == [4, 5]
    assert filled.num_late == 4
    for error in filled.errors.values():
        assert isinstance(error, InvalidRequestError)
        assert "a mask takes longer than 0.5 s" in error.message
    # Four threads are lost for now, their places are taken.
    assert not filler.fill(rows(at_once, at_once, at_once), bitmask).errors
    assert (bitmask[:6, 0] == [7, 7, 7, 0, 7, 7]).all()
    # What comes too late is written nowhere: the row may be another sequence's by now.
    bitmask[:] = 0
    release.set()
    assert not filler.fill(rows(at_once), bitmask).errors
    assert (bitmask[1:] == 0).all()
    filler.close()


def test_a_step_ends_even_if_all_threads_are_lost(release: threading.Event) -> None:
    """Enough stuck requests would stop all others, without an error."""
    filler = MaskFiller(1, MaskLimits(row_seconds=0.05, step_seconds=0.5))
    bitmask = np.zeros((32, 4), np.int32)
    filled = filler.fill(rows(*[lambda: release.wait(DEADLINE)] * 20, at_once), bitmask)
    assert len(filled.errors) == 21
    assert {type(error) for error in filled.errors.values()} == {InvalidRequestError, OverloadedError}
    # Those that wait are told to try again; when the threads are back, it goes on.
    assert isinstance(filler.fill(rows(at_once), bitmask).errors[0], OverloadedError)
    release.set()
    end = time.monotonic() + DEADLINE
    while filler.fill(rows(at_once), bitmask).errors:
        assert time.monotonic() < end
    filler.close()


class Standstill:
    """Stands for the module `time`: as if the process stood still for 100 seconds, when `begin` is called."""

    def __init__(self) -> None:
        self._ahead = 0.0
        self._seen = threading.Event()

    def monotonic(self) -> float:
        if self._ahead:
            self._seen.set()
        return time.monotonic() + self._ahead

    def begin(self) -> None:
        """Returns when it was noticed."""
        self._ahead = 100.0
        self._seen.wait(DEADLINE)


def test_a_standstill_is_no_mask_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod without CPU time for a second, or a machine that is moved, would end requests that are not at fault."""
    standstill = Standstill()
    for module in ("fill", "batch"):
        monkeypatch.setattr(f"quire.sidecar.grammar.{module}.time", standstill)
    filler = MaskFiller(1, MaskLimits(row_seconds=0.2, step_seconds=0.5))
    filled = filler.fill(rows(at_once, standstill.begin, at_once), np.zeros((3, 4), np.int32))
    assert not filled.errors and sorted(filled.results) == [0, 1, 2]
    filler.close()


def test_slow_ones_have_their_turn_last(release: threading.Event) -> None:
    """One slow request after another would use up the time of those that never took any."""
    filler = MaskFiller(1, MaskLimits(row_seconds=0.2, step_seconds=0.2))
    slow = MaskRow(1, 0, StuckMatcher(lambda: release.wait(DEADLINE), seconds=0.1), [])
    filled = filler.fill(
        [slow, *(MaskRow(n, n, StuckMatcher(at_once), []) for n in range(2, 9))], np.zeros((9, 4), np.int32)
    )
    assert list(filled.errors) == [1]
    assert len(filled.results) == 7
    filler.close()


def test_nobody_waits_behind_a_slow_mask() -> None:
    """One thread has enough to do with cheap masks; one that is not as cheap as its last would hold up the others."""
    filler = MaskFiller(4, MaskLimits(row_seconds=DEADLINE, step_seconds=DEADLINE))
    filled = threading.Event()
    stuck = MaskRow(0, 0, StuckMatcher(lambda: filled.wait(DEADLINE)), [])
    last = MaskRow(9, 9, StuckMatcher(filled.set, seconds=1e-6), [])
    cheap = [MaskRow(n, n, StuckMatcher(at_once, seconds=1e-7), []) for n in range(1, 9)]
    before = time.monotonic()
    assert not filler.fill([stuck, *cheap, last], np.zeros((10, 4), np.int32)).errors
    assert time.monotonic() - before < DEADLINE / 2
    filler.close()


def test_cheap_masks_are_one_threads_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen threads that wait for each other take longer than one; two slow masks are for two."""
    monkeypatch.setattr("quire.sidecar.grammar.fill._ENOUGH_S", DEADLINE)
    filler = MaskFiller(16, MaskLimits(row_seconds=DEADLINE, step_seconds=DEADLINE))
    threads: set[int] = set()

    def note() -> None:
        threads.add(threading.get_ident())

    cheap = [MaskRow(n, n, StuckMatcher(note, seconds=1e-4), []) for n in range(64)]
    assert not filler.fill(cheap, np.zeros((64, 4), np.int32)).errors
    assert len(threads) == 1
    both = threading.Barrier(2)
    slow = [MaskRow(n, n, StuckMatcher(lambda: both.wait(DEADLINE), seconds=DEADLINE), []) for n in range(2)]
    assert not filler.fill(slow, np.zeros((2, 4), np.int32)).errors
    filler.close()


def test_threads_do_not_wait_for_each_others_lexers() -> None:
    """One that waits for a lexer's lock holds the GIL, and stops all the others."""
    filler = MaskFiller(4, MaskLimits(row_seconds=DEADLINE, step_seconds=DEADLINE))
    first, second = new_lexer(), new_lexer()
    using, most = {first: 0, second: 0}, {first: 0, second: 0}
    both = threading.Barrier(2)

    def use(lexer: Lexer) -> None:
        using[lexer] += 1
        most[lexer] = max(most[lexer], using[lexer])
        both.wait(DEADLINE)
        using[lexer] -= 1

    matchers = [StuckMatcher(partial(use, lexer), 1.0, lexer) for lexer in [first] * 8 + [second] * 8]
    work = [MaskRow(index, index, matcher, []) for index, matcher in enumerate(matchers)]
    assert len(filler.fill(work, np.zeros((16, 4), np.int32)).results) == 16
    assert most == {first: 1, second: 1}
    filler.close()


def test_a_lexers_rows_have_their_turn_after_one_that_was_given_up(release: threading.Event) -> None:
    """No thread is left for them: all others have gone, as the lexer was in use."""
    filler = MaskFiller(2, MaskLimits(row_seconds=0.2, step_seconds=DEADLINE))
    lexer = new_lexer()
    stuck = MaskRow(0, 0, StuckMatcher(lambda: release.wait(DEADLINE), lexer=lexer), [])
    behind = [MaskRow(n, n, StuckMatcher(at_once, lexer=lexer), []) for n in range(1, 4)]
    filled = filler.fill([stuck, *behind], np.zeros((4, 4), np.int32))
    assert list(filled.errors) == [0]
    assert sorted(filled.results) == [1, 2, 3]
    filler.close()


def test_a_bug_ends_its_row_alone() -> None:
    """The thread would die with it, and the step wait for its deadline."""
    filler = MaskFiller(1, MaskLimits())

    def fail() -> None:
        raise ZeroDivisionError("a bug")

    filled = filler.fill(rows(fail, at_once), np.zeros((2, 4), np.int32))
    assert filled.errors[0].code is ErrorCode.INTERNAL
    assert list(filled.results) == [1]
    filler.close()
