"""An engine core with a real sidecar that is killed, stopped, or never comes back."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from awake_clock import AwakeClock
from sidecar_process import DEADLINE, SidecarProcess, regex

from quire.engine.core import EngineCore
from quire.engine.page_pool import PagePool
from quire.engine.plan import StepPlan, StepResult
from quire.engine.runner import DeviceInfo, StepMasks
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.engine.sidecar_masks import SidecarMasks
from quire.service.checkpoint import TextModel, load_text, locate
from quire.service.errors import UnavailableError
from quire.service.request import Constraint, Finished, FinishReason, Request, SamplingParams, StopConditions

# Of an AwakeClock. A step may wait for masks a quarter of a second, once; the rest is for a busy machine.
LONGEST_GAP_S = 2.0
NUM_DIGITS = 60


@dataclass
class FirstToken:
    """A step that draws the first token which its mask allows, or token 7."""

    plan: StepPlan
    result: StepResult | None = None

    def draw(self, masks: StepMasks | None) -> None:
        tokens = [7 if work.sample else -1 for work in self.plan.work]
        if masks is not None:
            for index, row in zip(masks.work, masks.batch.rows, strict=True):
                tokens[index] = int(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))[0])
        self.result = StepResult(tuple(tokens))

    def wait(self) -> StepResult:
        assert self.result is not None
        # A model's time, or request 1 would be done before the sidecar is back.
        threading.Event().wait(0.002)
        return self.result


class FirstTokenRunner:
    """`quire.engine.runner.Runner` without a model."""

    info = DeviceInfo("none", "none", 1)

    def launch(self, plan: StepPlan, *, masked: bool) -> FirstToken:
        step = FirstToken(plan)
        if not masked:
            step.draw(None)
        return step

    def close(self) -> None:
        """Holds nothing."""


@dataclass
class Engine:
    """A core, what its requests got, and the longest time that request 1 was without a new token."""

    core: EngineCore
    clock: AwakeClock
    tokens: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, Finished] = field(default_factory=dict)
    gap: float = 0.0
    last: float | None = None

    def submit(self, key: int, constraint: Constraint | None, max_tokens: int) -> None:
        stop = StopConditions(max_tokens)
        self.core.submit(key, Request(str(key), "m", (1, 5), SamplingParams(0.0), stop, constraint=constraint))
        self.tokens[key] = []

    def step(self) -> None:
        for update in self.core.step():
            self.tokens[update.key] += update.token_ids
            if update.finished is not None:
                assert update.key not in self.finished
                self.finished[update.key] = update.finished
            if update.key == 1:
                now = self.clock.now()
                self.gap, self.last = max(self.gap, now - (now if self.last is None else self.last)), now

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            self.step()


@pytest.fixture(scope="module")
def smollm() -> TextModel:
    return load_text(locate())


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[SidecarProcess]:
    with SidecarProcess(tmp_path) as process:
        process.wait_until_serving()
        yield process


@contextmanager
def engine(
    sidecar: SidecarProcess, smollm: TextModel, folder: Path, deadline_s: float, *, run_ahead: bool
) -> Iterator[Engine]:
    """One that runs request 1, which is free, and constrained requests 2 to 9, each in the middle."""
    # Until the sidecar has compiled it takes as long as it takes.
    masks = SidecarMasks(sidecar.address, smollm.vocab_size, 16, DEADLINE, folder)
    scheduler = Scheduler(SchedulerConfig(16, 64, 64_000), PagePool(8192), frozenset(smollm.eos_token_ids))
    core = EngineCore(FirstTokenRunner(), scheduler, masks, smollm.vocab_size, run_ahead=run_ahead)
    with AwakeClock() as clock:
        running = Engine(core, clock)
        running.submit(1, None, 60_000)
        for key in range(2, 10):
            running.submit(key, regex(f"[0-9]{{{NUM_DIGITS}}}"), 1000)
        running.until(lambda: len(running.tokens[9]) > 5)
        masks._deadline_s = deadline_s
        yield running
        core.close()


@pytest.mark.parametrize("run_ahead", [False, True])
def test_killed_amid_many_sequences(
    sidecar: SidecarProcess, smollm: TextModel, tmp_path: Path, run_ahead: bool
) -> None:
    """Constrained requests would end, or begin again; all others would stand still until the sidecar is back."""
    with engine(sidecar, smollm, tmp_path, DEADLINE, run_ahead=run_ahead) as running:
        undisturbed = smollm.tokenizer.token_to_id("0")
        sidecar.kill()
        count = len(running.tokens[1])
        running.until(lambda: len(running.tokens[1]) > count + 50)
        sidecar.restart()
        running.until(lambda: len(running.finished) == 8)
        for key in range(2, 10):
            assert running.finished[key].reason is FinishReason.STOP
            assert running.tokens[key][:-1] == [undisturbed] * NUM_DIGITS
        assert running.gap < LONGEST_GAP_S


def test_stopped_and_continued(sidecar: SidecarProcess, smollm: TextModel, tmp_path: Path) -> None:
    """A sidecar that hangs, which no connection tells of, would take the engine along."""
    with engine(sidecar, smollm, tmp_path, DEADLINE, run_ahead=True) as running:
        sidecar.process.send_signal(signal.SIGSTOP)
        count = len(running.tokens[1])
        running.until(lambda: len(running.tokens[1]) > count + 50)
        held = len(running.tokens[9])
        sidecar.process.send_signal(signal.SIGCONT)
        running.until(lambda: len(running.finished) == 8)
        assert held < NUM_DIGITS
        assert {finished.reason for finished in running.finished.values()} == {FinishReason.STOP}
        assert {len(running.tokens[key]) for key in range(2, 10)} == {NUM_DIGITS + 1}
        assert running.gap < LONGEST_GAP_S


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_never_comes_back(sidecar: SidecarProcess, smollm: TextModel, tmp_path: Path, number: signal.Signals) -> None:
    """Its requests would hang, with their clients and pages; or all would end."""
    with engine(sidecar, smollm, tmp_path, 2.0, run_ahead=True) as running:
        sidecar.process.send_signal(number)
        running.until(lambda: len(running.finished) == 8)
        for key in range(2, 10):
            assert isinstance(running.finished[key].error, UnavailableError)
        assert running.gap < LONGEST_GAP_S
        count = len(running.tokens[1])
        running.until(lambda: len(running.tokens[1]) > count + 50)


def test_an_answer_cut_off_by_max_tokens_is_no_stop(sidecar: SidecarProcess, smollm: TextModel, tmp_path: Path) -> None:
    """Half a JSON answer would be taken for a whole one; a whole one would go on behind its end."""
    with engine(sidecar, smollm, tmp_path, DEADLINE, run_ahead=True) as running:
        digits = regex("[0-9]{3}")
        for key, max_tokens in ((20, 2), (21, 3), (22, 4)):
            running.submit(key, digits, max_tokens)
        running.until(lambda: {20, 21, 22} <= running.finished.keys())
        reasons = [running.finished[key].reason for key in (20, 21, 22)]
        # The last of three digits leaves no room for the end token: nobody knows yet that it was the end.
        assert reasons == [FinishReason.LENGTH, FinishReason.LENGTH, FinishReason.STOP]
        assert running.tokens[22][-1] in smollm.eos_token_ids
        assert not set(smollm.eos_token_ids) & {*running.tokens[20], *running.tokens[21], *running.tokens[22][:-1]}
