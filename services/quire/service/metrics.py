"""Prometheus metrics: one registry per process, made in its main and passed to those who count.

Names follow Prometheus practice: `quire_<service>_<what>_<unit>`, counters end in `_total`.
"""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

# Seconds; from a token's time on a GPU to a long prompt's on a CPU.
LATENCY_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip

__all__ = ["CONTENT_TYPE_LATEST", "LATENCY_BUCKETS", "CollectorRegistry", "exposition"]


def exposition(registry: CollectorRegistry) -> bytes:
    """The registry in Prometheus' text format, to be served as CONTENT_TYPE_LATEST."""
    return generate_latest(registry)
