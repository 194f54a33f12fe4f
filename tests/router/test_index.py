"""The prefix index is compared with sets of pages, whatever engines do and in whatever order it is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import takewhile
from random import Random

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from quire.router.index import CacheReplica, PagesInProgress, PrefixIndex, page_keys
from quire.service.pages import HASH_BYTES, PAGE_SIZE, prefix_hashes
from quire.service.request import CacheKey

NUM_ENGINES = 3
SLICE = 2

engines = st.integers(0, NUM_ENGINES - 1)
pages = st.integers(0, 11)
page_sets = st.frozensets(pages, max_size=8)


def hashes(numbers: Iterable[int]) -> bytes:
    """What an engine would send for pages that the test numbers."""
    return b"".join(blake2b(bytes([number]), digest_size=HASH_BYTES).digest() for number in numbers)


@dataclass
class Engine:
    """What an engine has, what a router that was told so should believe, and the replica that it does believe."""

    replica: CacheReplica
    has: set[int] = field(default_factory=set)
    epoch: int = 1
    sequence: int = 0
    believed: set[int] = field(default_factory=set)
    believed_epoch: int | None = None
    believed_sequence: int = 0
    snapshot: Iterator[None] | None = None
    # What the snapshot under way will make of what is believed.
    coming: tuple[set[int], int, int] = (set(), 0, 0)

    def forget(self) -> None:
        self.believed, self.believed_epoch = set(), None


class IndexMachine(RuleBasedStateMachine):
    """Engines change, restart and vanish, events get lost, snapshots come in slices, sweeps run beside all that."""

    def __init__(self) -> None:
        super().__init__()
        # Exact: these engines drop any page at any time.
        self.index = PrefixIndex(stride=1)
        self.engines: list[Engine] = []
        self.sweeps: list[Iterator[None]] = []

    @initialize()
    def start(self) -> None:
        self.engines = [Engine(CacheReplica(self.index)) for _ in range(NUM_ENGINES)]

    @rule(number=engines, stored=page_sets, removed=page_sets, delivered=st.integers(0, 4).map(bool))
    def change(self, number: int, stored: frozenset[int], removed: frozenset[int], delivered: bool) -> None:
        engine = self.engines[number]
        engine.has = (engine.has - removed) | stored
        engine.sequence += 1
        if not delivered or engine.snapshot is not None:
            return
        applied = engine.replica.delta(engine.epoch, engine.sequence, hashes(stored), hashes(removed))
        same_life = engine.believed_epoch == engine.epoch
        assert applied == (same_life and engine.believed_sequence + 1 == engine.sequence)
        if applied:
            engine.believed = (engine.believed - removed) | stored
            engine.believed_sequence += 1
            assert engine.believed == engine.has
        elif not same_life:
            engine.forget()

    @rule(number=engines)
    def restart(self, number: int) -> None:
        engine = self.engines[number]
        engine.has, engine.epoch, engine.sequence = set(), engine.epoch + 1, 0

    @rule(number=engines)
    def lose(self, number: int) -> None:
        engine = self.engines[number]
        self.abandon(engine)
        engine.replica.forget()
        engine.forget()

    @rule(number=engines)
    def subscribe(self, number: int) -> None:
        engine = self.engines[number]
        self.abandon(engine)
        engine.coming = set(engine.has), engine.epoch, engine.sequence
        engine.snapshot = engine.replica.snapshot(engine.epoch, engine.sequence, hashes(sorted(engine.has)), SLICE)
        if engine.believed_epoch != engine.epoch:
            engine.forget()
        self.advance(engine)

    @rule(number=engines, slices=st.integers(1, 6))
    def receive(self, number: int, slices: int) -> None:
        for _ in range(slices):
            self.advance(self.engines[number])

    @rule(number=engines)
    def break_subscription(self, number: int) -> None:
        self.abandon(self.engines[number])

    @precondition(lambda self: len(self.sweeps) < 2)
    @rule()
    def begin_sweep(self) -> None:
        self.sweeps.append(self.index.sweep(SLICE))

    @precondition(lambda self: self.sweeps)
    @rule(which=st.integers(0, 1), slices=st.integers(1, 4), abandoned=st.booleans())
    def sweep_some(self, which: int, slices: int, abandoned: bool) -> None:
        sweep = self.sweeps[which % len(self.sweeps)]
        done = any(next(sweep, self) is self for _ in range(slices))
        if done or abandoned:
            self.sweeps.remove(sweep)

    @rule()
    def sweep_all(self) -> None:
        for _ in self.index.sweep(SLICE):
            pass
        if all(engine.snapshot is None for engine in self.engines):
            assert len(self.index) == len(set().union(*(engine.believed for engine in self.engines)))
            # Every retired holder's bit is free again, or the numbers would grow for ever.
            holder = self.index.open()
            assert holder <= 1 << NUM_ENGINES
            self.index.retire(holder)

    @rule(prompt=st.lists(pages, max_size=6))
    def match(self, prompt: list[int]) -> None:
        lengths = self.index.match(page_keys(hashes(prompt)))
        assert 0 not in lengths.values()
        for engine in self.engines:
            known = 0
            while known < len(prompt) and prompt[known] in engine.believed:
                known += 1
            assert lengths.pop(engine.replica.holder, 0) == known
        assert len(lengths) <= sum(engine.snapshot is not None for engine in self.engines)

    def teardown(self) -> None:
        for number in range(len(self.engines)):
            self.lose(number)
        for _ in self.index.sweep(SLICE):
            pass
        assert len(self.index) == 0
        assert self.index.match(page_keys(hashes(range(12)))) == {}

    def advance(self, engine: Engine) -> None:
        if engine.snapshot is not None and next(engine.snapshot, engine) is engine:
            engine.snapshot = None
            engine.believed, engine.believed_epoch, engine.believed_sequence = engine.coming
            assert engine.replica.epoch == engine.believed_epoch
            assert engine.replica.sequence == engine.believed_sequence

    def abandon(self, engine: Engine) -> None:
        """Drops the generator, as a watch that is cancelled does."""
        engine.snapshot = None


def test_the_index_holds_what_the_engines_said() -> None:
    """A page too many sends prompts where they must be computed again, a page too few computes what is there."""
    run_state_machine_as_test(IndexMachine, settings=settings(max_examples=200, stateful_step_count=40, deadline=None))


@given(
    prompts=st.lists(st.lists(st.integers(0, 1), max_size=5), max_size=8),
    order=st.randoms(use_true_random=False),
    asked=st.lists(st.integers(0, 1), max_size=6),
)
@settings(deadline=None)
def test_pages_in_progress_are_those_of_prompts_not_yet_ended(
    prompts: list[list[int]], order: Random, asked: list[int]
) -> None:
    """A prompt that ends must take only its own pages along: others that share them are still being computed."""

    def keys(pages_of: list[int]) -> list[int]:
        tokens = [page for page in pages_of for _ in range(PAGE_SIZE)]
        return page_keys(b"".join(prefix_hashes(CacheKey(), tokens)))

    in_progress = PagesInProgress()
    for prompt in prompts:
        in_progress.add(keys(prompt))
    left = list(prompts)
    order.shuffle(left)
    while True:
        shared = (
            sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, asked, strict=False)))
            for prompt in left
        )
        assert in_progress.match(keys(asked)) == max(shared, default=0)
        if not left:
            return
        in_progress.remove(keys(left.pop()))


def test_keys_are_the_first_60_bits_of_each_hash() -> None:
    """Snapshots and prompts must get the same keys, in order, or nothing would ever match."""
    first, second = bytes(range(16)), bytes(range(255, 239, -1))
    expected = [int.from_bytes(page[:8], "little") % (1 << 60) for page in (first, second)]
    assert page_keys(first + second) == expected
    assert page_keys(b"") == []


def test_a_prompt_is_matched_only_up_to_the_first_gap() -> None:
    """An engine that evicted a page in the middle must compute everything after it, whatever it still has."""
    index = PrefixIndex()
    whole, gap, tail = index.open(), index.open(), index.open()
    index.store(whole, [1, 2, 3])
    index.store(gap, [1, 3])
    index.store(tail, [2, 3])
    assert index.match([1, 2, 3]) == {whole: 3, gap: 1}
    assert index.match([1, 2, 4]) == {whole: 2, gap: 1}
    assert index.match([2]) == {whole: 1, tail: 1}
    assert index.match([]) == {} and index.match([9]) == {}


@given(
    held=st.lists(st.tuples(engines, st.integers(0, 2), st.integers(0, 30)), max_size=8),
    fork=st.integers(0, 30),
    asked=st.tuples(st.integers(0, 2), st.integers(0, 30)),
    stride=st.integers(2, 40),
)
@settings(deadline=None)
def test_looking_up_some_pages_tells_what_all_would(
    held: list[tuple[int, int, int]], fork: int, asked: tuple[int, int], stride: int
) -> None:
    """Prompts that fork anywhere, held up to anywhere, must be matched to the page though most are not looked up."""

    def prompt(branch: int, length: int) -> list[int]:
        return [page if page < fork else 100 * (branch + 1) + page for page in range(length)]

    exact, sampled = PrefixIndex(stride=1), PrefixIndex(stride)
    for index in (exact, sampled):
        holders = [index.open() for _ in range(NUM_ENGINES)]
        for engine, branch, length in held:
            index.store(holders[engine], prompt(branch, length))
    assert sampled.match(prompt(*asked)) == exact.match(prompt(*asked))


def test_an_epoch_that_is_over_is_forgotten_before_the_new_one_is_known() -> None:
    """After a restart the engine's cache is empty: matches from its last life would be promises that it can't keep."""
    index = PrefixIndex()
    replica = CacheReplica(index)
    for _ in replica.snapshot(1, 5, hashes([0, 1])):
        pass
    prompt = page_keys(hashes([0, 1]))
    assert index.match(prompt)[replica.holder] == 2
    assert not replica.delta(2, 6, hashes([3]), b"")
    assert replica.holder not in index.match(prompt)
    slices = replica.snapshot(2, 7, hashes([0]), 1)
    next(slices)
    assert replica.holder not in index.match(prompt)
    assert next(slices, None) is None and index.match(prompt)[replica.holder] == 1
