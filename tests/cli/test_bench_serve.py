"""`quire bench`: the numbers of a scripted stream, failures, and what is sent."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_api import MODEL, BreakOff, Refusal, ScriptedApi, events

from quire.cli.api import EventReader, Server
from quire.cli.bench.prompts import Workload
from quire.cli.bench.samples import Distribution, Sample, Summary
from quire.cli.bench.serve import Bench, BenchConfig
from quire.cli.main import main
from quire.service.errors import QuireError


class Clock:
    """Time as the script lets it pass."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class ScriptedServer(Server):
    """Answers inside the client: each event comes `delays[i]` seconds after the one before, by `clock`."""

    clock: Clock = Clock()  # noqa: RUF009
    delays: Sequence[float] = ()

    @property
    def client_options(self) -> dict[str, Any]:
        return {**super().client_options, "transport": httpx.MockTransport(self._answer)}

    def _answer(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)

        async def stream() -> AsyncIterator[bytes]:
            pieces = ["x"] * body["max_tokens"]
            for index, event in enumerate(events(body, pieces)):
                self.clock.now += self.delays[index] if index < len(pieces) else 0.0
                yield event

        return httpx.Response(200, content=stream())


async def test_times_are_those_of_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever tunes a server by these numbers must be able to trust them."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    server = ScriptedServer(clock=clock, delays=(0.5, 0.1, 0.2, 0.1, 0.6))
    bench = Bench(server, MODEL, BenchConfig(requests=3, concurrency=1, input_len=20, output_len=5))
    await bench.run(lambda: None)
    summary = Summary.of(bench.samples)
    assert summary.succeeded == 3 and summary.output_tokens == 15
    assert summary.seconds == pytest.approx(4.5)
    assert summary.output_tokens_per_second == pytest.approx(15 / 4.5)
    assert summary.requests_per_second == pytest.approx(3 / 4.5)
    assert times(summary.time_to_first_token) == pytest.approx((0.5, 0.5, 0.5))
    # Between the first piece and the last, not from the request to the first.
    assert times(summary.inter_token) == pytest.approx((0.25, 0.15, 0.6))
    assert times(summary.end_to_end) == pytest.approx((1.5, 1.5, 1.5))


def times(distribution: Distribution | None) -> tuple[float, float, float]:
    """Mean, p50, p99."""
    assert distribution is not None
    return astuple(distribution)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=300))
def test_percentiles_of_any_times(values: list[float]) -> None:
    """p50 is the median and p99 leaves one in a hundred above it, however few there are."""
    mean, p50, p99 = times(Distribution.of(values))
    assert min(values) <= p50 <= p99 <= max(values)
    assert min(values) <= mean + 1e-9 and mean <= max(values) + 1e-9
    below = sum(value <= p50 + 1e-9 for value in values)
    assert below >= len(values) / 2
    assert sum(value > p99 + 1e-9 for value in values) <= 1 + len(values) // 100


def test_failures_count_as_failures_and_not_in_the_rates() -> None:
    """A server that refuses half of the load at once must not look twice as fast."""
    good = Sample(10.0, 12.0, (11.0, 12.0), prompt_tokens=5, cached_tokens=3, output_tokens=2)
    bad = [
        Sample(10.0, 10.1, error="overloaded"),
        Sample(11.0, 14.0, error="broke off"),
        Sample(10, 11, error="overloaded"),
    ]
    summary = Summary.of([good, *bad])
    assert (summary.succeeded, summary.failed) == (1, 3)
    assert summary.errors == {"overloaded": 2, "broke off": 1}
    assert list(summary.errors) == ["overloaded", "broke off"]
    # The run ended with the last failure.
    assert summary.seconds == 4.0 and summary.output_tokens_per_second == 0.5
    assert times(summary.time_to_first_token) == (1.0, 1.0, 1.0)
    assert summary.cached_tokens == 3


def test_nothing_measured_is_no_error() -> None:
    """Ctrl-C may come before the first answer."""
    summary = Summary.of([])
    assert summary.succeeded == summary.failed == 0 and summary.time_to_first_token is None
    assert json.loads(json.dumps(summary.to_json()))["inter_token"] is None


def bench(api: ScriptedApi, *flags: str) -> int:
    return main(["bench", "--url", api.url, *flags])


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table that people paste and the file that scripts read hold the same run."""
    file = tmp_path / "run.json"
    with ScriptedApi(lambda body: ["a"] * body["max_tokens"]) as api:
        status = bench(api, "--requests", "5", "--input-len", "40", "--output-len", "7", "--json", str(file))
    assert status == 0
    run = json.loads(file.read_text())
    assert (run["succeeded"], run["failed"], run["output_tokens"]) == (5, 0, 35)
    assert run["model"] == MODEL and run["url"] == api.url and run["requests"] == 5
    assert run["time_to_first_token"]["mean"] > 0 and run["inter_token"]["p99"] >= run["inter_token"]["p50"]
    printed = capsys.readouterr().out
    assert f"{MODEL} on {api.url}: 5 requests of 40 tokens for 7, 5 at once" in printed
    assert "5 answers in" in printed and "35" in printed and "time to first token" in printed


def test_what_is_sent(capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts of the length asked for, all different from their first words on: a prefix cache must not help."""
    with ScriptedApi(lambda body: ["a"]) as api:
        assert bench(api, "--requests", "6", "--input-len", "50", "--output-len", "9", "--api-key", "secret") == 0
        calibration, measured = api.requests[:2], api.requests[2:]
    assert [body["max_tokens"] for body in calibration] == [1, 1]
    assert {body["max_tokens"] for body in measured} == {9}
    assert {len(body["prompt"].split()) for body in measured} == {50}
    assert len({" ".join(body["prompt"].split()[:5]) for body in api.requests}) == 8
    assert all(body["temperature"] == 0 and body["stream"] and body["ignore_eos"] for body in measured)
    assert all(headers["authorization"] == "Bearer secret" for headers in api.headers)


def test_two_runs_have_prompts_of_their_own_unless_seeded(capsys: pytest.CaptureFixture[str]) -> None:
    """The second run of the same command would otherwise measure the server's prefix cache."""

    def prompts(*flags: str) -> list[str]:
        with ScriptedApi(lambda body: ["a"]) as api:
            assert bench(api, "--requests", "2", "--concurrency", "1", *flags) == 0
            return [body["prompt"] for body in api.requests if body["max_tokens"] > 1]

    assert not set(prompts()) & set(prompts())
    assert prompts("--seed", "7") == prompts("--seed", "7") != prompts("--seed", "8")


@given(st.integers(1, 300), st.integers(1, 40), st.floats(1, 3))
def test_any_tokenizer_gives_about_the_length_asked_for(length: int, tail: int, tokens_per_word: float) -> None:
    """The server's own counts of two prompts decide how many words the others have."""

    def count(prompt: Workload) -> int:
        return tail + round(prompt.words * tokens_per_word)

    probe = Workload(length)
    workload = Workload.of_tokens(length, tail_tokens=tail, words=length, words_tokens=count(probe), seed=0)
    assert abs(count(workload) - max(length, tail)) <= 2 + tokens_per_word


def test_a_server_without_ignore_eos(capsys: pytest.CaptureFixture[str]) -> None:
    """OpenAI's own API refuses fields that it does not know: it can be measured all the same."""

    def strict(body: dict[str, Any]) -> list[str] | Refusal:
        return Refusal.openai(400, "unknown field", "ignore_eos") if "ignore_eos" in body else ["a"]

    with ScriptedApi(strict) as api:
        assert bench(api, "--requests", "2") == 0
        assert all("ignore_eos" not in body for body in api.requests[1:])


def test_some_requests_fail(capsys: pytest.CaptureFixture[str]) -> None:
    """Refused, broken off or in a shape of its own: each is counted with its reason, and the others are measured."""
    answers: Iterator[Any] = iter(
        [
            ["calibration"],
            ["calibration"],
            ["a", "b"],
            Refusal.openai(429, "too many [requests]"),
            Refusal(502, b"<html>bad gateway</html>"),
            breaking_off(),
            ["a", "b"],
        ]
    )
    with ScriptedApi(lambda body: next(answers)) as api:
        assert bench(api, "--requests", "5", "--concurrency", "1") == 1
    printed = capsys.readouterr().out
    assert "2 answers in" in printed and "3 failed" in printed
    assert "1 × error: too many [requests]\n" in printed
    assert "1 × error: the server answers with status 502: <html>bad gateway</html>\n" in printed
    assert "1 × error: the answer broke off\n" in printed


def breaking_off() -> Iterator[str]:
    yield "half an"
    raise BreakOff


def test_all_requests_fail(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A table of zeros would hide what went wrong."""
    answers: Iterator[Any] = iter([["calibration"], ["calibration"]])
    with ScriptedApi(lambda body: next(answers, Refusal.openai(503, "no engine is ready"))) as api:
        assert bench(api, "--requests", "3", "--json", str(tmp_path / "run.json")) == 1
    printed = capsys.readouterr().out
    assert "no request succeeded" in printed and "3 × error: no engine is ready" in printed and "┃" not in printed
    assert json.loads((tmp_path / "run.json").read_text())["failed"] == 3


def test_a_server_that_can_not_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong with every request is said once, without a table."""
    with ScriptedApi(lambda body: Refusal.openai(404, "no model 'x'", "model")) as api:
        assert bench(api, "--model", "x") == 1
    captured = capsys.readouterr()
    assert captured.err == "quire: no model 'x'\n" and captured.out == ""
    with ScriptedApi(lambda body: ["a"], models=[]) as api:
        assert bench(api) == 1
    assert "name one with --model" in capsys.readouterr().err


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    """The first thing that goes wrong for a newcomer: the message says what to type."""
    with ScriptedApi(lambda body: ["a"]) as api:
        url = api.url
    for command in ("bench", "chat"):
        assert main([command, "--url", url]) == 1
        assert f"no answer from {url}" in (error := capsys.readouterr().err) and "start it with `quire serve`" in error


def test_a_file_that_can_not_be_written_is_found_out_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Ten minutes of measuring must not be lost to a wrong path."""
    with ScriptedApi(lambda body: ["a"]) as api:
        assert bench(api, "--json", str(tmp_path / "missing" / "run.json")) == 2
        assert api.requests == []
    assert "can't be written" in capsys.readouterr().err


async def test_rate_does_not_wait_for_answers() -> None:
    """An open load goes on when the server stalls, or it would hide that the server stalls."""
    stalled = asyncio.Event()

    class Stalling(ScriptedServer):
        def _answer(self, request: httpx.Request) -> httpx.Response:
            body = json.loads(request.content)

            async def stream() -> AsyncIterator[bytes]:
                if body["max_tokens"] > 1:
                    arrived.append(body)
                    if len(arrived) == 4:
                        stalled.set()
                    await stalled.wait()
                for event in events(body, ["x"]):
                    yield event

            return httpx.Response(200, content=stream())

    arrived: list[dict[str, Any]] = []
    bench = Bench(Stalling(), MODEL, BenchConfig(requests=4, rate=1000.0, input_len=4, output_len=2))
    await asyncio.wait_for(bench.run(lambda: None), 10)
    assert len(bench.samples) == 4


async def test_concurrency_is_the_most_at_once() -> None:
    """`--concurrency 3` must load the server with three requests: neither two nor four."""
    running, most = 0, 0

    class Counting(ScriptedServer):
        def _answer(self, request: httpx.Request) -> httpx.Response:
            body = json.loads(request.content)

            async def stream() -> AsyncIterator[bytes]:
                nonlocal running, most
                running += 1
                most = max(most, running)
                for event in events(body, ["x"] * 5):
                    await asyncio.sleep(0)
                    yield event
                running -= 1

            return httpx.Response(200, content=stream())

    ended: list[None] = []
    bench = Bench(Counting(), MODEL, BenchConfig(requests=20, concurrency=3, input_len=4, output_len=5))
    await bench.run(lambda: ended.append(None))
    assert most == 3 and len(ended) == len(bench.samples) == 20


@given(st.data())
def test_events_survive_any_cut(data: st.DataObject) -> None:
    """A network cuts a stream anywhere, inside a character too."""
    body = b"".join(events({"prompt": "", "stream_options": {"include_usage": True}}, ["a\u2028b", "é", "\n\n", "👩"]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=12)))
    reader, read = EventReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
        read += list(reader.feed(body[start:end]))
    reader.close()
    text = "".join(choice.get("text", "") for event in read for choice in event["choices"])
    assert text == "a\u2028bé\n\n👩" and read[-1]["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"data: nonsense\n", "not JSON"),
        (b"data: 5\n", "no object"),
        (b'data: {"error": {"message": "the engine died"}}\n', "the engine died"),
        (b'data: {"error": "the engine died"}\n', "the engine died"),
        (b'data: {"error": {"code": 7}}\n', "7"),
        (b"data: {}\n", "broke off"),
    ],
)
def test_broken_streams(sent: bytes, message: str) -> None:
    """Whatever a server sends becomes a message, not a traceback."""
    reader = EventReader()
    with pytest.raises(QuireError, match=message):
        list(reader.feed(sent))
        reader.close()
