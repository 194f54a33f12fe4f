"""What is counted at the gate. Tenants are a label: their number is that of the key file's."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class AccessMetrics:
    """One instance per process, in `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._refusals = Counter(
            "quire_gateway_refusals_total",
            "Requests that were not let in. Reasons: no_key, unknown_key, expired_key, concurrency, requests, tokens, "
            "gateway_concurrency.",
            ("tenant", "reason"),
            registry=registry,
        )
        self._tokens = Counter(
            "quire_gateway_tenant_tokens_total",
            "Tokens by tenant; direction: input, output.",
            ("tenant", "direction"),
            registry=registry,
        )
        self._reloads = Counter(
            "quire_gateway_reloads_total",
            "Files that were loaded again; file: api_keys, tls, router_tls; outcome: ok, failed.",
            ("file", "outcome"),
            registry=registry,
        )
        self._stale = Gauge(
            "quire_gateway_file_stale",
            "1 while the file on the disk can't be used and an older version is in its place.",
            ("file",),
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.stalled = Counter(
            "quire_gateway_stalled_readers_total",
            "Streams that were cut off because their client stopped reading.",
            ("api",),
            registry=registry,
        )

    def refused(self, tenant: str, reason: str) -> None:
        """A request was not let in."""
        self._refusals.labels(tenant, reason).inc()

    def used(self, tenant: str, direction: str, tokens: int) -> None:
        """A tenant's tokens."""
        self._tokens.labels(tenant, direction).inc(tokens)

    def reloaded(self, file: str, ok: bool) -> None:
        """A file has changed and was loaded, or could not be."""
        self._reloads.labels(file, "ok" if ok else "failed").inc()
        self._stale.labels(file).set(0 if ok else 1)
