"""An OpenAI-compatible server on loopback that answers what the test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

MODEL = "scripted"


@dataclass(frozen=True)
class Refusal:
    """An answer that is not 200."""

    status: int
    body: bytes

    @classmethod
    def openai(cls, status: int, message: str, param: str | None = None) -> Refusal:
        """In OpenAI's shape."""
        return cls(status, json.dumps({"error": {"message": message, "param": param}}).encode())


class BreakOff(Exception):  # noqa: N818
    """Raised by a script: the connection ends in the middle of the answer."""


# From a request's body to the pieces of the answer's text, which are sent as they come.
Script = Callable[[dict[str, Any]], "Iterable[str] | Refusal"]


class ScriptedApi:
    """Serves from the beginning to the end of a `with` block; `requests` are the bodies that came.

    Tokens are counted as words of the prompt and pieces of the answer. `models` is what GET /v1/models lists.
    """

    def __init__(self, script: Script, models: list[str] | None = None) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), _handler(self, script, [MODEL] if models is None else models)
        )
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> ScriptedApi:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def events(body: dict[str, Any], pieces: Iterable[str]) -> Iterable[bytes]:
    """The answer to `body` as server-sent events."""
    chat = "messages" in body
    count = 0
    for count, piece in enumerate(pieces, 1):  # noqa: B007
        yield _event({"choices": [{"delta": {"content": piece}} if chat else {"text": piece}]})
    reason = "length" if count == body.get("max_tokens") else "stop"
    yield _event({"choices": [{"finish_reason": reason, **({"delta": {}} if chat else {"text": ""})}]})
    if (body.get("stream_options") or {}).get("include_usage"):
        usage = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": count}
        yield _event({"choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def _handler(api: ScriptedApi, script: Script, models: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(200, json.dumps({"data": [{"id": model} for model in models]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            api.requests.append(body)
            api.headers.append({name.lower(): value for name, value in self.headers.items()})
            answer = script(body)
            if isinstance(answer, Refusal):
                self._reply(answer.status, answer.body)
                return
            # The body ends with the connection: HTTP/1.0.
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            try:
                for event in events(body, answer):
                    self.wfile.write(event)
                    self.wfile.flush()
            except (BreakOff, ConnectionError):
                self.close_connection = True

        def _reply(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """A test's output is not for this."""

    return Handler
