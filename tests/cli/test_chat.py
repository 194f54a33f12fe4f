"""`quire chat`: in a terminal, from a pipe, and what it asks the server for."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_api import MODEL, BreakOff, Refusal, ScriptedApi
from terminal import Terminal

from quire.cli.chat import ChatConfig, Conversation
from quire.cli.main import main
from quire.service.errors import QuireError

COMMAND = [sys.executable, "-m", "quire.cli.main", "chat"]


def echo(body: dict[str, Any]) -> list[str]:
    """Says what was said last, word by word."""
    words = body["messages"][-1]["content"].split(" ")
    return [f"{word} " if index < len(words) - 1 else word for index, word in enumerate(words)]


class Held:
    """Begins an answer, then waits until the client is gone or the test says to go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def __call__(self, body: dict[str, Any]) -> Iterator[str]:
        yield "Once upon"
        while not self.go_on.wait(0.01):
            yield "."


def asked(api: ScriptedApi) -> list[list[tuple[str, str]]]:
    """The messages of each request."""
    return [[(message["role"], message["content"]) for message in body["messages"]] for body in api.requests]


def test_a_conversation() -> None:
    """The model must hear all that was said, and /reset must make it forget."""
    with ScriptedApi(echo) as api, Terminal([*COMMAND, "--url", api.url, "--system", "Be brief."]) as terminal:
        terminal.expect(f"{MODEL} on {api.url}. /help for help.")
        terminal.expect("> ")
        terminal.type("one two\r")
        terminal.expect("one two")
        terminal.expect("one two\r\n> ")
        terminal.type("three\r")
        terminal.expect("three\r\nthree\r\n> ")
        terminal.type("/reset\r")
        terminal.expect("> ")
        terminal.type("four\r")
        terminal.expect("four\r\nfour\r\n> ")
        terminal.type("/quit\r")
        assert terminal.wait() == 0
        system = ("system", "Be brief.")
        first = [system, ("user", "one two")]
        assert asked(api) == [
            first,
            [*first, ("assistant", "one two"), ("user", "three")],
            [system, ("user", "four")],
        ]


def test_several_lines_are_one_message() -> None:
    """Code and letters have lines; each must not be a question of its own."""
    with ScriptedApi(echo) as api, Terminal([*COMMAND, "--url", api.url]) as terminal:
        terminal.expect("> ")
        terminal.type('"""def f():\r')
        terminal.expect("... ")
        terminal.type("    return 1\r")
        terminal.expect("... ")
        terminal.type('"""\r')
        terminal.expect("return 1\r\n> ")
        terminal.type('"""on one"""\r')
        terminal.expect("on one\r\n> ")
        terminal.type("\x04")
        assert terminal.wait() == 0
        assert [said[-1][1] for said in asked(api)] == ["def f():\n    return 1", "on one"]


def test_ctrl_c_stops_the_answer_and_not_the_chat() -> None:
    """A model that rambles must be stopped without losing the conversation; what it said belongs to it."""
    held = Held()
    with ScriptedApi(lambda body: held(body) if len(api.requests) == 1 else echo(body)) as api:
        with Terminal([*COMMAND, "--url", api.url]) as terminal:
            terminal.expect("> ")
            terminal.type("Tell me a story.\r")
            terminal.expect("Once upon")
            terminal.type("\x03")
            terminal.expect("(stopped)\r\n> ")
            held.go_on.set()
            terminal.type("half a line\x03")
            terminal.expect("(Ctrl-D leaves)\r\n> ")
            terminal.type("Thanks\r")
            terminal.expect("Thanks\r\nThanks\r\n> ")
            terminal.type("\x04")
            assert terminal.wait() == 0
        story, answer, thanks = asked(api)[1]
        assert story == ("user", "Tell me a story.") and thanks == ("user", "Thanks")
        assert answer[0] == "assistant" and answer[1].startswith("Once upon")
        assert "Traceback" not in terminal.output


def test_help_and_commands_that_are_not_there() -> None:
    """A typing error after a slash must not be sent to the model."""
    with ScriptedApi(echo) as api, Terminal([*COMMAND, "--url", api.url]) as terminal:
        terminal.expect("> ")
        terminal.type("/help\r")
        terminal.expect("/reset  forgets the conversation")
        terminal.type("/rest\r")
        terminal.expect("there is no /rest:")
        # Before there is a prompt Ctrl-D is for nobody.
        terminal.expect("\r\n> ")
        terminal.type("\x04")
        assert terminal.wait() == 0
        assert api.requests == []


def test_the_chat_survives_the_server() -> None:
    """A server that fails or is started again must not cost the conversation; the question is asked anew."""
    answers: Iterator[Any] = iter([["fine"], breaking_off(), Refusal.openai(503, "no engine is ready"), ["again"]])
    with ScriptedApi(lambda body: next(answers)) as api, Terminal([*COMMAND, "--url", api.url]) as terminal:
        for question, shown in [
            ("a", "fine\r\n> "),
            ("b", "half\r\nquire: the answer broke off\r\n> "),
            ("c", "quire: no engine is ready\r\n> "),
            ("d", "again\r\n> "),
        ]:
            terminal.type(f"{question}\r")
            terminal.expect(shown)
        terminal.type("\x04")
        assert terminal.wait() == 0
        assert [text for _, text in asked(api)[-1]] == ["a", "fine", "b", "half", "d"]


def breaking_off() -> Iterator[str]:
    yield "half"
    raise BreakOff


def piped(monkeypatch: pytest.MonkeyPatch, api: ScriptedApi, text: str, *flags: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return main(["chat", "--url", api.url, *flags])


def test_a_pipe_is_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts want the answer and nothing else; a text of many lines, even with a slash, is one question."""
    with ScriptedApi(lambda body: ["An", " answer."]) as api:
        assert piped(monkeypatch, api, "/usr/bin\nis what?\n\n") == 0
        assert asked(api) == [[("user", "/usr/bin\nis what?")]]
    assert capsys.readouterr() == ("An answer.\n", "")


def test_a_pipe_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A script sees a failure by the status, and nothing on standard output that could pass for an answer."""
    with ScriptedApi(lambda body: Refusal.openai(400, "no")) as api:
        assert piped(monkeypatch, api, "hi") == 1
        assert capsys.readouterr() == ("", "quire: no\n")
        assert piped(monkeypatch, api, " \n") == 2
        assert "standard input is empty" in capsys.readouterr().err


def test_an_answer_that_was_cut_off_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a sentence looks like a broken model otherwise."""
    with ScriptedApi(lambda body: ["a", "b"]) as api:
        assert piped(monkeypatch, api, "hi", "--max-tokens", "2") == 0
    assert "cut off" in capsys.readouterr().err


def test_control_characters_do_not_reach_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model could otherwise clear the screen, set titles, or type for the user on some terminals."""
    with ScriptedApi(lambda body: ["a\x1b]0;title\x07b\n", "\tc\x9b2Jd\r"]) as api:
        assert piped(monkeypatch, api, "hi") == 0
    assert capsys.readouterr().out == "a]0;titleb\n\tc2Jd\n"


def test_flags_become_the_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: object) -> None:
    """Each flag must arrive; one that was not given is the server's to decide."""
    schema = {"type": "object", "required": ["total"]}
    file = tmp_path / "my invoice.json"
    file.write_text(json.dumps(schema))
    with ScriptedApi(echo) as api:
        piped(monkeypatch, api, "hi")
        assert set(api.requests[0]) == {"model", "messages", "stream"}
        flags = ("--temperature", "0.5", "--max-tokens", "9", "--json-schema", str(file), "--model", "other")
        piped(monkeypatch, api, "hi", *flags)
        body = api.requests[1]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("other", 0.5, 9)
    assert body["response_format"]["json_schema"] == {"name": "my_invoice", "schema": schema}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "can't be read"), ("{", "is not JSON"), ("[]", "must hold an object")],
)
def test_a_bad_schema_file(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before anything is asked, with the file's name."""
    file = tmp_path / "schema.json"
    if content is not None:
        file.write_text(content)
    assert main(["chat", "--json-schema", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(file) in error and error.count("\n") == 1


def test_a_message_without_an_answer_is_taken_back() -> None:
    """Two questions in a row confuse models, and some templates refuse them."""
    with ScriptedApi(lambda body: Refusal.openai(503, "busy")) as api, httpx.Client(base_url=api.url) as client:
        conversation = Conversation(client, MODEL, ChatConfig(system="s"))
        with pytest.raises(QuireError, match="busy"):
            list(conversation.say("hi"))
        assert [message["role"] for message in conversation.messages] == ["system"]
