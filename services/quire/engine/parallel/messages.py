"""What rank 0 and its followers say to each other.

Rank 0 sends pickles: followers chose to trust whoever they were told to connect to. Followers send JSON, since anyone
may connect to rank 0.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from itertools import chain

from quire.engine.config import CoreConfig
from quire.engine.plan import StepPlan, Work
from quire.engine.scheduler import SchedulerConfig


@dataclass(frozen=True, slots=True)
class Refused:
    """The answer to a Hello that does not fit."""

    reason: str


@dataclass(frozen=True, slots=True)
class Join:
    """All are there: meet at the store on `port`, then load this rank's part of the model. `host` is rank 0's host."""

    config: CoreConfig
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Measure:
    """All parts are loaded: find out, together, how many pages fit beside them."""

    limits: SchedulerConfig
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Begin:
    """Steps follow, on so many pages."""

    num_pages: int


@dataclass(frozen=True, slots=True)
class Launch:
    """See quire.engine.runner.Runner. A step's work is pickled as one array: one by one it takes four times as long."""

    plan: StepPlan

    def __reduce__(self) -> tuple[object, ...]:
        return _launch, (replace(self.plan, work=()), array("q", chain.from_iterable(self.plan.work)).tobytes())


def _launch(plan: StepPlan, numbers: bytes) -> Launch:
    width = len(Work._fields)
    columns = array("q", numbers).tolist()
    rows = zip(*(columns[field::width] for field in range(width)), strict=True)
    return Launch(replace(plan, work=tuple(map(Work._make, rows))))


@dataclass(frozen=True, slots=True)
class Prepare:
    """See quire.engine.runner.Runner."""


@dataclass(frozen=True, slots=True)
class End:
    """Nothing follows."""


ToFollower = Refused | Join | Measure | Begin | Launch | Prepare | End


@dataclass(frozen=True, slots=True)
class Hello:
    """A follower's first message: which rank it is, of how many, and the process on which host."""

    rank: int
    size: int
    host: str
    process: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """The answer to Join."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The answer to Measure."""

    num_pages: int


@dataclass(frozen=True, slots=True)
class Failed:
    """It can't go on, and ends."""

    reason: str


FromFollower = Hello | Loaded | Measured | Failed
