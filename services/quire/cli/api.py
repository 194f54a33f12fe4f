"""An OpenAI-compatible server as `quire chat` and `quire bench` see it: where it is, its events, its errors."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from quire.service.errors import ConfigError, QuireError, UnavailableError

DEFAULT_URL = "http://127.0.0.1:8000"

_VERSION = re.compile(r"/v\d+$")
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}
# A long prompt on a slow machine is silent for minutes before its first token.
_TIMEOUT = httpx.Timeout(10, read=900)


class ApiError(QuireError):
    """The server refused or broke off a request. `status` is HTTP's, 200 if the answer had begun."""

    def __init__(self, message: str, *, status: int, field: str = "") -> None:
        super().__init__(message, field=field)
        self.status = status


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go. `url` may end in /v1 or not; `api_key` is empty if none is needed."""

    url: str = DEFAULT_URL
    api_key: str = ""

    def __post_init__(self) -> None:
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"--url is {self.url!r} ({error}): give one like {DEFAULT_URL}", field="url") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"--url is {self.url!r}: give one like {DEFAULT_URL}", field="url")

    @property
    def client_options(self) -> dict[str, Any]:
        """Arguments for httpx.Client and httpx.AsyncClient."""
        base = self.url.rstrip("/")
        options: dict[str, Any] = {
            "base_url": base if _VERSION.search(base) else f"{base}/v1",
            "timeout": _TIMEOUT,
            # A proxy can't reach this machine's own addresses.
            "trust_env": httpx.URL(base).host not in _LOOPBACK,
        }
        if base.startswith("https:"):
            # With SSL_CERT_FILE, for this machine's own addresses too: their certificates are seldom anybody else's.
            options["verify"] = httpx.create_ssl_context()
        if self.api_key:
            options["headers"] = {"authorization": f"Bearer {self.api_key}"}
        return options

    def unreachable(self, error: httpx.TransportError) -> UnavailableError:
        """What to say when there is no connection, or no longer one."""
        reason = str(error) or type(error).__name__
        return UnavailableError(
            f"no answer from {self.url} ({reason}): start it with `quire serve`, or name another with --url"
        )

    def first_model(self) -> str:
        """The name of the first model that the server lists. Raises ApiError, UnavailableError."""
        try:
            with httpx.Client(**self.client_options) as client:
                response = client.get("/models")
        except httpx.TransportError as error:
            raise self.unreachable(error) from error
        if response.status_code != httpx.codes.OK:
            raise refusal(response.status_code, response.content)
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise ApiError(f"{self.url} lists no models: name one with --model", status=response.status_code) from error


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """--url, --model and --api-key, for `server_of` and `Server.first_model`."""
    add = parser.add_argument
    add("--url", default=DEFAULT_URL, help="where the server is (default: %(default)s)")
    add("--model", default="", metavar="NAME", help="what to ask for (default: the first that the server lists)")
    add("--api-key", metavar="KEY", help="(default: OPENAI_API_KEY of the environment, if the server needs one)")


def server_of(arguments: argparse.Namespace) -> Server:
    """The server that the flags name. Raises ConfigError."""
    given: str | None = arguments.api_key
    return Server(arguments.url, os.environ.get("OPENAI_API_KEY", "") if given is None else given)


def refusal(status: int, body: bytes) -> ApiError:
    """The error of an answer that is not 200, in whatever shape it comes."""
    try:
        return _error(json.loads(body)["error"], status)
    except (ValueError, LookupError, TypeError):
        text = body.decode(errors="replace").strip()[:200]
        return ApiError(f"the server answers with status {status}{': ' + text if text else ''}", status=status)


class EventReader:
    """Server-sent events out of the pieces of a body. Lines end at line feeds only: text may hold other breaks."""

    def __init__(self) -> None:
        self._rest = b""
        # Whether the server said that the answer is complete.
        self.done = False

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The events that `data` completes. Raises ApiError for one that carries an error."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            content = line[5:].strip()
            if content == b"[DONE]":
                self.done = True
                continue
            yield _event(content)

    def close(self) -> None:
        """Raises ApiError if the stream ended before it was complete."""
        if not self.done:
            raise ApiError("the answer broke off", status=200)


def _event(content: bytes) -> dict[str, Any]:
    try:
        event = json.loads(content)
    except ValueError as error:
        raise ApiError(f"the server sent an event that is not JSON: {content[:80]!r}", status=200) from error
    if not isinstance(event, dict):
        raise ApiError(f"the server sent an event that is no object: {content[:80]!r}", status=200)
    if "error" in event:
        raise _error(event["error"], 200)
    return event


def _error(error: Any, status: int) -> ApiError:
    if not isinstance(error, dict):
        return ApiError(str(error), status=status)
    return ApiError(str(error.get("message", error)), status=status, field=str(error.get("param") or ""))
