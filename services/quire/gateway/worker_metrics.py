"""The metrics of several workers as one: each writes its values to a file, and whichever is scraped adds them up.

`server` prepares this before the first metric is made. Without workers metrics live in the process, as ever.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from quire.gateway.workers import Worker


def share_values(worker: Worker) -> None:
    """Has this process' metrics kept in files, under its worker's index.

    A worker that is started again goes on counting where the one before it ended; what that one had in flight is gone.
    """
    mark_process_dead(worker.index, worker.metrics)  # type: ignore[no-untyped-call]
    # The one switch that prometheus_client has for it. By its process' number, as it would be on its own, counters of
    # the dead would pile up.
    values.ValueClass = values.MultiProcessValue(lambda: worker.index)  # type: ignore[no-untyped-call]


def registry_of_all(worker: Worker) -> CollectorRegistry:
    """What to show for all workers."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, worker.metrics)  # type: ignore[no-untyped-call]
    return registry
