"""`quire chat`: a conversation in the terminal, or one answer to what a pipe holds."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from quire.cli.api import EventReader, Server, add_server_flags, refusal, server_of
from quire.cli.flags import Parser, at_least
from quire.service.errors import ConfigError, QuireError

_EXAMPLES = """\
  quire chat
      with the model that `quire serve` serves on this machine
  quire chat --system "Answer in one sentence." --temperature 0
  quire chat --json-schema invoice.json
      every answer is JSON that fits the schema
  quire chat --system "Summarize this." < article.txt > summary.txt
      the input is one message; only the answer goes to standard output"""

_HELP = """\
/reset  forgets the conversation
/quit   leaves, as Ctrl-D does
\"""     begins a message of several lines, and ends it
Ctrl-C  stops the answer, or takes back what was typed"""

_QUOTES = '"""'

# A model's text must not move the cursor, or set a title, or worse.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class ChatConfig:
    """How the model is asked; None and {} leave it to the server."""

    system: str = ""
    temperature: float | None = None
    max_tokens: int | None = None
    response_format: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.temperature is not None:
            at_least("--temperature", self.temperature, 0)
        if self.max_tokens is not None:
            at_least("--max-tokens", self.max_tokens, 1)


class Conversation:
    """The messages so far. What was said stays; a message that got no answer is taken back."""

    def __init__(self, client: httpx.Client, model: str, config: ChatConfig) -> None:
        self._client = client
        self._model = model
        self._config = config
        self.messages: list[dict[str, str]] = []
        # Why the last answer ended, in OpenAI's words; empty if it was stopped.
        self.finish_reason = ""
        self.reset()

    def reset(self) -> None:
        """Back to the beginning."""
        self.messages = [{"role": "system", "content": self._config.system}] if self._config.system else []

    def say(self, text: str) -> Generator[str]:
        """Yields the answer as it comes; what has come is kept as the answer, whether or not it goes on to its end.

        Raises ApiError, httpx.TransportError.
        """
        self.messages.append({"role": "user", "content": text})
        self.finish_reason = ""
        answer: list[str] = []
        try:
            for piece in self._stream():
                answer.append(piece)
                yield piece
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": "".join(answer)})
            else:
                self.messages.pop()

    def _stream(self) -> Iterator[str]:
        with self._client.stream("POST", "/chat/completions", json=self._body()) as response:
            if response.status_code != httpx.codes.OK:
                raise refusal(response.status_code, response.read())
            events = EventReader()
            for data in response.iter_bytes():
                for event in events.feed(data):
                    for choice in event.get("choices", ()):
                        self.finish_reason = choice.get("finish_reason") or self.finish_reason
                        if content := choice.get("delta", {}).get("content"):
                            yield content
            events.close()

    def _body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "messages": self.messages, "stream": True}
        if self._config.temperature is not None:
            body["temperature"] = self._config.temperature
        if self._config.max_tokens is not None:
            body["max_tokens"] = self._config.max_tokens
        if self._config.response_format:
            body["response_format"] = self._config.response_format
        return body


def main(argv: list[str]) -> int:
    """Talks until the input ends; 1 if a piped message failed, 130 after Ctrl-C on one. Raises QuireError."""
    arguments = _parser().parse_args(argv)
    server = server_of(arguments)
    config = config_of(arguments)
    model = arguments.model or server.first_model()
    with httpx.Client(**server.client_options) as client:
        conversation = Conversation(client, model, config)
        if sys.stdin.isatty() and sys.stdout.isatty():
            _converse(server, conversation, f"{model} on {server.url}. /help for help.")
            return 0
        message = sys.stdin.read().strip()
        if not message:
            raise ConfigError("standard input is empty: give the message there, or run `quire chat` in a terminal")
        return int(not _answer(server, conversation, message))


def config_of(arguments: argparse.Namespace) -> ChatConfig:
    """The config that the flags ask for. Raises ConfigError."""
    return ChatConfig(
        system=arguments.system,
        temperature=arguments.temperature,
        max_tokens=arguments.max_tokens,
        response_format=_response_format(Path(arguments.json_schema)) if arguments.json_schema else {},
    )


def _parser() -> Parser:
    parser = Parser("chat", "Talks to a model that any OpenAI-compatible server serves.", _EXAMPLES)
    add = parser.add_argument
    add_server_flags(parser)
    add("--system", default="", metavar="TEXT", help="the system message")
    add("--temperature", type=float, metavar="T", help="0 is greedy (default: the server's)")
    add("--max-tokens", type=int, metavar="N", help="the longest answer (default: the server's)")
    add("--json-schema", metavar="FILE", help="a JSON Schema that every answer must fit")
    return parser


def _response_format(path: Path) -> dict[str, Any]:
    try:
        schema = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"--json-schema {path} can't be read ({error.strerror}): name a file") from error
    except ValueError as error:
        raise ConfigError(f"--json-schema {path} is not JSON ({error}): correct it") from error
    if not isinstance(schema, dict):
        raise ConfigError(f"--json-schema {path} must hold an object, such as {{}}")
    name = re.sub(r"[^a-zA-Z0-9_-]", "_", path.stem)[:64] or "schema"
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


def _converse(server: Server, conversation: Conversation, greeting: str) -> None:
    # Gives input() its arrow keys and history; not every Python has it.
    with suppress(ImportError):
        import readline  # noqa: F401
    _note(greeting)
    while (message := _read_message()) is not None:
        match message:
            case "":
                pass
            case "/quit":
                return
            case "/reset":
                conversation.reset()
            case "/help":
                _note(_HELP)
            case _ if message.startswith("/"):
                _note(f"there is no {message.split()[0]}:\n{_HELP}")
            case _:
                try:
                    _answer(server, conversation, message)
                except KeyboardInterrupt:
                    _note("(stopped)")


def _read_message() -> str | None:
    """What is typed at the prompt; None at the end of the input."""
    try:
        line = input("> ").strip()
        if not line.startswith(_QUOTES):
            return line
        lines = [line.removeprefix(_QUOTES)]
        while not lines[-1].endswith(_QUOTES):
            lines.append(input("... ").rstrip())
        return "\n".join(lines).removesuffix(_QUOTES).strip()
    except KeyboardInterrupt:
        print()
        _note("(Ctrl-D leaves)")
        return ""
    except EOFError:
        print()
        return None


def _answer(server: Server, conversation: Conversation, message: str) -> bool:
    """Prints the answer as it comes; False if there was none or it broke off, which is said."""
    failure = ""
    begun = False
    try:
        for piece in conversation.say(message):
            begun = True
            print(_CONTROLS.sub("", piece), end="", flush=True)
    except httpx.TransportError as error:
        failure = server.unreachable(error).message
    except QuireError as error:
        failure = error.message
    finally:
        if begun:
            print(flush=True)
    if failure:
        _note(f"quire: {failure}")
    elif conversation.finish_reason == "length":
        _note("(cut off: the answer may have no more tokens)")
    return not failure


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
