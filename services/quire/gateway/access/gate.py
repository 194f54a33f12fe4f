"""Lets requests in or refuses them: who asks, within which limits. Knows neither HTTP nor gRPC.

Both servers do the same: `caller` when a request arrives, `enter` before they read it, and on the Admission that they
get they call `options`, `start` and `counting`. Leaving the Admission's `with` block gives its place to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from quire.gateway.access.keys import ApiKey, KeyRing
from quire.gateway.access.ledger import Ledger, Meter
from quire.gateway.access.metrics import AccessMetrics
from quire.gateway.errors import AuthenticationError, BusyError, ModelNotFoundError, RateLimitError
from quire.gateway.options import Options
from quire.gateway.output import Generation
from quire.service.errors import InvalidRequestError
from quire.service.reload import Reloaded

# Output tokens are charged in portions: the ledger's lock is not for every token.
_PORTION = 64

_NO_KEY = "send an API key as `Authorization: Bearer KEY`"


@dataclass(frozen=True, slots=True)
class GateLimits:
    """The gateway's own limits. `max_requests` counts this process' requests in flight, of everybody."""

    max_requests: int
    max_choices: int


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request; `key` is None where everybody may."""

    key: ApiKey | None = None

    @property
    def tenant(self) -> str:
        """Empty where everybody may."""
        return self.key.tenant if self.key is not None else ""

    def may_use(self, model: str) -> bool:
        """Whether the key is for `model`."""
        return self.key is None or self.key.models is None or model in self.key.models

    def check_model(self, model: str) -> None:
        """Raises ModelNotFoundError unless the key is for `model`."""
        if not self.may_use(model):
            raise ModelNotFoundError(f"model {model!r} is not served to this API key: ask for another", field="model")


class Gate:
    """`keys` is None for a gateway that is open to everybody; with it, nobody comes in without a key."""

    def __init__(
        self, keys: Reloaded[KeyRing] | None, ledger: Ledger, limits: GateLimits, metrics: AccessMetrics
    ) -> None:
        self._keys = keys
        self._ledger = ledger
        self._limits = limits
        self._metrics = metrics
        self._in_flight = 0

    def caller(self, authorization: str | None) -> Caller:
        """Who sent the header or metadata `authorization`. Raises AuthenticationError."""
        if self._keys is None:
            return Caller()
        scheme, _, secret = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            self._metrics.refused("", "no_key")
            raise AuthenticationError(f"no API key was sent: {_NO_KEY}")
        key = self._keys.value.find(secret.strip())
        if key is None:
            self._metrics.refused("", "unknown_key")
            raise AuthenticationError(f"the API key is not known here: {_NO_KEY} that was given to you")
        if key.expired:
            self._metrics.refused(key.tenant, "expired_key")
            raise AuthenticationError(f"the API key expired at {key.expires}: ask for a new one")
        return Caller(key)

    def enter(self, caller: Caller) -> Admission:
        """A place for one more request; use it as a context manager. Raises RateLimitError and BusyError."""
        if self._in_flight >= self._limits.max_requests:
            self._metrics.refused(caller.tenant, "gateway_concurrency")
            raise BusyError(
                f"the gateway serves {self._in_flight} requests, which is its limit (--max-requests): try again",
                retry_after=1.0,
            )
        if caller.key is not None:
            self._count(caller.key)
        self._in_flight += 1
        return Admission(self, caller)

    def _count(self, key: ApiKey) -> None:
        ledger = self._ledger
        if key.concurrency is not None and not ledger.enter(key.digest, key.concurrency):
            self._metrics.refused(key.tenant, "concurrency")
            raise RateLimitError(
                f"concurrency: this API key has {key.concurrency} requests in flight, which is its limit: wait for one "
                "to end",
                retry_after=1.0,
            )
        if key.requests_per_minute is None:
            return
        if wait := ledger.take(key.digest, Meter.REQUESTS, 1, key.requests_per_minute):
            if key.concurrency is not None:
                ledger.leave(key.digest)
            self._metrics.refused(key.tenant, "requests")
            raise RateLimitError(
                f"rate: this API key may send {key.requests_per_minute} requests a minute: try again in {wait:.1f} s",
                retry_after=wait,
            )

    def take_prompt(self, caller: Caller, tokens: int) -> None:
        """Charges a prompt's tokens. Raises RateLimitError, InvalidRequestError if there can never be enough."""
        key = caller.key
        if key is None:
            return
        if (limit := key.tokens_per_minute) is not None:
            if tokens > limit:
                raise InvalidRequestError(
                    f"the prompt has {tokens} tokens and this API key may use {limit} a minute: shorten it",
                    field="prompt",
                )
            if wait := self._ledger.take(key.digest, Meter.TOKENS, tokens, limit):
                self._metrics.refused(key.tenant, "tokens")
                raise RateLimitError(
                    f"tokens: this API key may use {limit} tokens a minute and the prompt has {tokens}: try again in "
                    f"{wait:.1f} s",
                    retry_after=wait,
                )
        self._metrics.used(key.tenant, "input", tokens)

    def spend(self, key: ApiKey, tokens: int) -> None:
        """Charges output tokens, which came whether or not the key had as many left."""
        if key.tokens_per_minute is not None:
            self._ledger.spend(key.digest, Meter.TOKENS, tokens, key.tokens_per_minute)
        self._metrics.used(key.tenant, "output", tokens)

    def leave(self, key: ApiKey | None) -> None:
        """A request has ended."""
        self._in_flight -= 1
        if key is not None and key.concurrency is not None:
            self._ledger.leave(key.digest)

    def reader_stalled(self, api: str) -> None:
        """A client was cut off because it had stopped reading."""
        self._metrics.stalled.labels(api).inc()

    def check_choices(self, choices: int) -> None:
        """Raises InvalidRequestError if one request asks for too many outputs."""
        if choices > self._limits.max_choices:
            raise InvalidRequestError(
                f"n and prompt ask for {choices} outputs: this gateway gives at most {self._limits.max_choices} a "
                "request",
                field="n",
            )

    def headers(self, caller: Caller) -> dict[str, str]:
        """x-ratelimit-… as things stand now, as OpenAI's clients know them, for the limits that the key has."""
        headers: dict[str, str] = {}
        key = caller.key
        if key is None:
            return headers
        limits = {Meter.REQUESTS: key.requests_per_minute, Meter.TOKENS: key.tokens_per_minute}
        for meter, limit in limits.items():
            if limit is not None:
                name = meter.name.lower()
                level = self._ledger.level(key.digest, meter, limit)
                headers[f"x-ratelimit-limit-{name}"] = str(limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, int(level)))
                headers[f"x-ratelimit-reset-{name}"] = _duration((limit - level) * 60 / limit)
        return headers


class Admission:
    """One request's place."""

    def __init__(self, gate: Gate, caller: Caller) -> None:
        self.caller = caller
        self._gate = gate
        # Taken when the request came in: it goes out by the same terms, whatever the file says by then.
        self._key = caller.key
        self._unpaid = 0

    def __enter__(self) -> Admission:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pay()
        self._gate.leave(self._key)

    def options(self, options: Options) -> Options:
        """`options` within what the key may do. Raises InvalidRequestError.

        The tenant becomes a part of the cache salt, so that tenants never share pages; no salt that a client can send
        makes it another tenant's, because the tenant's length comes first.
        """
        key = self._key
        if key is None:
            return options
        if options.priority > key.max_priority:
            raise InvalidRequestError(
                f"priority is {options.priority}: this API key may ask for at most {key.max_priority}",
                field="priority",
            )
        return replace(options, cache_salt=f"{len(key.tenant)}:{key.tenant}:{options.cache_salt}")

    def start(self, generations: Sequence[Generation], choices: int = 1) -> None:
        """Charges the prompts; `choices` generations share each. Raises RateLimitError, InvalidRequestError."""
        self._gate.check_choices(len(generations))
        prompts = (generation.request.prompt_token_ids for generation in generations[::choices])
        self._gate.take_prompt(self.caller, sum(map(len, prompts)))

    def counting(self, progress: Callable[[int], None]) -> Callable[[int], None]:
        """`progress`, which hears of each step's new output tokens, with a charge for them beside it."""

        def both(tokens: int) -> None:
            progress(tokens)
            self._unpaid += tokens
            if self._unpaid >= _PORTION:
                self._pay()

        return both

    def _pay(self) -> None:
        tokens, self._unpaid = self._unpaid, 0
        if self._key is not None and tokens:
            self._gate.spend(self._key, tokens)


def _duration(seconds: float) -> str:
    """As OpenAI writes them: 20ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{max(0, round(seconds * 1000))}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}m{rest:.0f}s" if minutes else f"{rest:.3g}s"
