"""SidecarDrafts against real sidecars: what is told once, who is not waited for, a sidecar that dies or hangs."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from sidecar_process import DEADLINE, SidecarProcess, eventually

from quire.engine.sidecar_drafts import SidecarDrafts
from quire.engine.speculation.drafts import DraftRequest

TEXT = [11, 12, 13, 14, 15, 16, 17, 18]
# An answer from a machine that does other things beside it, or stands still for seconds.
PATIENT_S = 30.0


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    with SidecarProcess(tmp_path_factory.mktemp("sidecar")) as process:
        process.wait_until_serving()
        yield process


@pytest.fixture
def drafts(sidecar: SidecarProcess) -> Iterator[SidecarDrafts]:
    source = SidecarDrafts(sidecar.address, PATIENT_S)
    yield source
    source.close()


def ask(
    drafts: SidecarDrafts, sequence: int, token_ids: Sequence[int], released: Sequence[int] = (), tenant: str = ""
) -> tuple[int, ...]:
    request = DraftRequest(sequence, token_ids, 4, tenant, len(TEXT))
    found: Mapping[int, tuple[int, ...]] = drafts.begin([request], released).wait()
    return found.get(sequence, ())


def until_drafts(ask_once: Callable[[], tuple[int, ...]], wanted: Sequence[int]) -> None:
    # What is left of older drafts may come first.
    eventually(lambda: ask_once() == tuple(wanted))


def test_drafts_of_a_growing_text(drafts: SidecarDrafts) -> None:
    """Tokens that are told twice, or not at all, make another text, and drafts of it are wrong."""
    text = [*TEXT, *TEXT[:3]]
    until_drafts(lambda: ask(drafts, 1, text), TEXT[3:6])
    for token in TEXT[3:6]:
        text.append(token)
        assert ask(drafts, 1, text)[:2] == tuple(TEXT[len(text) - 8 : len(text) - 6])
    # What it said is a draft for others, once it has ended.
    text += [90, 91, 92, 93]
    ask(drafts, 1, text)
    eventually(lambda: len(ask(drafts, 2, [*range(200, 208), 15, 16, 90], [1])) > 0)


def test_a_sidecar_that_was_started_again_is_told_everything(tmp_path: Path) -> None:
    """There would be no drafts, or wrong ones, until the engine is started again, too."""
    with SidecarProcess(tmp_path) as sidecar:
        drafts = SidecarDrafts(sidecar.address, PATIENT_S)
        text = [*TEXT, *TEXT[:3]]
        # While there is none, nobody waits.
        began = time.perf_counter()
        assert ask(drafts, 1, text) == ()
        assert time.perf_counter() - began < PATIENT_S / 2
        until_drafts(lambda: ask(drafts, 1, text), TEXT[3:6])
        sidecar.restart()
        text.append(TEXT[3])
        until_drafts(lambda: ask(drafts, 1, text), TEXT[4:8])
        drafts.close()


def test_an_answer_that_is_late_helps_a_later_step(sidecar: SidecarProcess) -> None:
    """On a busy machine all answers are late, and there would be no drafts although all of them were made."""
    drafts = SidecarDrafts(sidecar.address, 0.0)
    eventually(lambda: drafts._stream is not None)
    text = [*TEXT, *TEXT[:3]]
    ask(drafts, 1, text)
    assert drafts._stream is not None
    newest = drafts._stream.newest
    eventually(lambda: 1 in newest)
    text.append(TEXT[3])
    assert ask(drafts, 1, text)[:2] == tuple(TEXT[4:6])
    # What it says of another text than the one that came is of no use, and of one that has ended of none to keep.
    text.append(99)
    assert ask(drafts, 1, text) == ()
    ask(drafts, 2, [1], [1])
    eventually(lambda: drafts._stream is not None and not drafts._stream.unanswered)
    assert 1 not in newest
    drafts.close()


def test_a_sidecar_that_hangs_costs_little_and_is_not_flooded(tmp_path: Path) -> None:
    """Every step would take as long as the patience, and the engine's memory would fill with what nobody takes."""
    with SidecarProcess(tmp_path) as sidecar:
        sidecar.wait_until_serving()
        drafts = SidecarDrafts(sidecar.address, 0.002)
        ticket = drafts.begin([], [])
        eventually(lambda: drafts._stream is not None)
        sidecar.process.send_signal(signal.SIGSTOP)
        text = [*TEXT, *TEXT[:3]]
        began = time.perf_counter()
        for _ in range(1000):
            text.append(5)
            assert ask(drafts, 1, text) == ()
        assert time.perf_counter() - began < DEADLINE / 10
        assert drafts._stream is not None
        assert len(drafts._stream.unanswered) <= 8
        sidecar.process.send_signal(signal.SIGCONT)
        # What it was told meanwhile and what was left out is one text again; slow answers are forgotten.
        eventually(lambda: len(ask(drafts, 2, [*TEXT, *TEXT[:3]])) > 0)
        assert ticket.wait() == {}
        drafts.close()


def test_closing_does_not_wait_for_a_sidecar_that_never_came(tmp_path: Path) -> None:
    """The engine could not be stopped."""
    drafts = SidecarDrafts(f"unix:{tmp_path / 'nobody.sock'}")
    began = time.monotonic()
    drafts.close()
    assert time.monotonic() - began < DEADLINE / 2
