"""The clients of the gateway's cost benchmark: a process that keeps streams open and counts, or sends at a fixed rate.

    python tests/benchmarks/gateway_load.py streams http://127.0.0.1:8000 --streams 128 --seconds 5
    python tests/benchmarks/gateway_load.py rate http://127.0.0.1:8000 --rate 100 --seconds 10
    python tests/benchmarks/gateway_load.py session unix:/tmp/engine.sock --rate 100 --seconds 10
    python tests/benchmarks/gateway_load.py grpc 127.0.0.1:8001 --streams 128 --seconds 5
    python tests/benchmarks/gateway_load.py hold http://127.0.0.1:8000 --streams 1000

HTTP goes over bare asyncio sockets without a parser: what comes is searched for bytes, so that the client needs a
fraction of the server's time. It writes `begin` and `end` around what it measures, and then its figures as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop

from quire.service.grpc_server import channel
from quire.service.request import Request, SamplingParams, StopConditions
from quire.service.wire import request_to_proto
from quire.v1 import inference_pb2, inference_pb2_grpc, session_pb2, session_pb2_grpc

QUESTION = "What is the capital of France, and how many people live there today? Answer in one sentence."
STOPS = ["\n\nUser:", "###", "<end>"]


def chat(model: str, max_tokens: int) -> bytes:
    """A request for a streamed chat, with stop strings that never come."""
    body = json.dumps(
        {
            "model": model,
            "stream": True,
            "max_tokens": max_tokens,
            "stop": STOPS,
            "messages": [{"role": "user", "content": QUESTION}],
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer none\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@dataclass
class Counts:
    """What came in, over all streams."""

    bytes: int = 0
    events: int = 0
    tokens: int = 0
    ended: int = 0
    reads: int = 0


class Stream(asyncio.Protocol):
    """One connection that asks again as soon as its answer has ended."""

    def __init__(self, request: bytes, counts: Counts) -> None:
        self._request = request
        self._counts = counts
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is none of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        counts = self._counts
        events = data.count(b"data: ")
        counts.reads += 1
        counts.bytes += len(data)
        counts.events += events
        # A token is a word with a space before it.
        counts.tokens += data.count(b" ") - events
        # An answer's last chunk; it is small, so that it does not come in two.
        if data.endswith(b"0\r\n\r\n") and b"[DONE]" in data:
            counts.ended += 1
            assert self._transport is not None
            self._transport.write(self._request)


@dataclass
class Latencies:
    """Seconds to the first token, and of the whole answer."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    errors: int = 0


class Timed(asyncio.Protocol):
    """A connection that is used for one request at a time."""

    def __init__(self, latencies: Latencies, idle: list[Timed]) -> None:
        self._latencies = latencies
        self._idle = idle
        self._transport: asyncio.Transport | None = None
        self._began = 0.0
        self._waiting_for_first = False
        self.counted = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is none of asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def send(self, request: bytes) -> None:
        """Asks; the answer's times are noted as they come."""
        assert self._transport is not None
        self._waiting_for_first = True
        self._began = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        # The event that opens a choice goes out when the first token is there.
        if self._waiting_for_first and b"data: " in data:
            self._waiting_for_first = False
            if self.counted:
                self._latencies.first.append(now - self._began)
        if data.endswith(b"0\r\n\r\n"):
            if self.counted:
                self._latencies.whole.append(now - self._began)
            if self._waiting_for_first:
                self._latencies.errors += 1
            self._idle.append(self)


async def keep_streams(host: str, port: int, request: bytes, streams: int, seconds: float) -> dict[str, Any]:
    """Tokens a second over `streams` connections that are never idle."""
    loop = asyncio.get_running_loop()
    counts = Counts()
    transports = [
        (await loop.create_connection(lambda: Stream(request, counts), host, port))[0] for _ in range(streams)
    ]
    await asyncio.sleep(1)
    before, began, busy = Counts(**vars(counts)), time.perf_counter(), time.process_time()
    print("begin", flush=True)
    await asyncio.sleep(seconds)
    print("end", flush=True)
    wall, busy = time.perf_counter() - began, time.process_time() - busy
    for transport in transports:
        transport.close()
    done = {name: value - getattr(before, name) for name, value in vars(counts).items()}
    return done | {"wall": wall, "cpu": busy}


async def keep_rate(host: str, port: int, request: bytes, rate: float, seconds: float) -> dict[str, Any]:
    """Latencies at `rate` requests a second, whose arrivals are random and do not wait for answers."""
    loop = asyncio.get_running_loop()
    latencies, idle = Latencies(), list[Timed]()
    draw = random.Random(0)
    tasks = []
    began = time.perf_counter()
    due, end = began, began + 1 + seconds
    print("begin", flush=True)

    async def ask(counted: bool) -> None:
        if idle:
            connection = idle.pop()
        else:
            _, connection = await loop.create_connection(lambda: Timed(latencies, idle), host, port)
        connection.counted = counted
        connection.send(request)

    while due < end:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        # The first second warms up.
        tasks.append(loop.create_task(ask(due - began > 1)))
        due += draw.expovariate(rate)
    await asyncio.gather(*tasks)
    await asyncio.sleep(0.5)
    print("end", flush=True)
    return {
        "first": sorted(latencies.first),
        "whole": sorted(latencies.whole),
        "errors": latencies.errors,
        "asked": len(tasks),
    }


async def keep_session_rate(address: str, model: str, rate: float, seconds: float) -> dict[str, Any]:
    """The same as keep_rate on a session with an engine: what it takes without gateway and router."""
    began: dict[int, float] = {}
    first, tokens = list[float](), list(range(100, 150))
    async with channel(address) as dialed:
        stream = session_pb2_grpc.SessionServiceStub(dialed).Session()
        await stream.write(session_pb2.SessionRequest(hello=session_pb2.Hello(peer="load")))

        async def read() -> None:
            async for response in stream:
                for update in response.step.updates:
                    if update.key in began:
                        first.append(time.perf_counter() - began.pop(update.key))

        reading = asyncio.create_task(read())
        draw = random.Random(0)
        due = time.perf_counter()
        end = due + seconds
        print("begin", flush=True)
        for key in itertools.count(1):
            if due > end:
                break
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            request = Request(f"r{key}", model, (*tokens[1:], key % 1000), SamplingParams(), StopConditions(2))
            submit = session_pb2.Submit(key=key, request=request_to_proto(request))
            began[key] = time.perf_counter()
            await stream.write(session_pb2.SessionRequest(submit=submit))
            due += draw.expovariate(rate)
        await asyncio.sleep(0.5)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    return {"first": sorted(first), "whole": sorted(first), "errors": len(began), "asked": len(first)}


async def keep_grpc_streams(address: str, model: str, streams: int, seconds: float) -> dict[str, Any]:
    """The same as keep_streams over the public gRPC service."""
    messages = 0

    async def stream(stub: Any) -> None:
        nonlocal messages
        options = inference_pb2.GenerationOptions(max_tokens=4000, stop=STOPS)
        prompt = inference_pb2.Prompt(text=QUESTION)
        request = inference_pb2.GenerateStreamRequest(model=model, prompt=prompt, options=options)
        while True:
            async for _ in stub.GenerateStream(request):
                messages += 1

    async with channel(address) as dialed:
        # Messages are counted, not decoded.
        raw = dialed.unary_stream(
            "/quire.v1.InferenceService/GenerateStream",
            request_serializer=inference_pb2.GenerateStreamRequest.SerializeToString,
            response_deserializer=None,
        )
        stub = inference_pb2_grpc.InferenceServiceStub(dialed)
        stub.GenerateStream = raw
        tasks = [asyncio.create_task(stream(stub)) for _ in range(streams)]
        await asyncio.sleep(1)
        before, began, busy = messages, time.perf_counter(), time.process_time()
        print("begin", flush=True)
        await asyncio.sleep(seconds)
        print("end", flush=True)
        wall, busy, counted = time.perf_counter() - began, time.process_time() - busy, messages - before
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {"tokens": counted, "events": counted, "wall": wall, "cpu": busy}


async def hold(host: str, port: int, request: bytes, streams: int) -> dict[str, Any]:
    """Opens streams whose one token has come and whose end has not."""
    loop = asyncio.get_running_loop()
    counts = Counts()
    for _ in range(streams):
        await loop.create_connection(lambda: Stream(request, counts), host, port)
    # The event that opens a choice, and one with the token.
    while counts.events < 2 * streams:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    print("begin", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    print("end", flush=True)
    return {"streams": streams}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["streams", "rate", "session", "grpc", "hold"])
    parser.add_argument("target", help="a URL, or an address for grpc and session")
    parser.add_argument("--model", default="smollm", help="(default: %(default)s)")
    parser.add_argument("--streams", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="to measure (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=4000, metavar="N", help="of an answer (default: %(default)s)")
    parser.add_argument("--path", default="", help="GET this instead of chatting")
    arguments = parser.parse_args()
    url = urlsplit(arguments.target)
    where = (url.hostname or "", url.port or 80)
    request = chat(arguments.model, 1 if arguments.kind == "hold" else arguments.max_tokens)
    if arguments.path:
        request = f"GET {arguments.path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()
    match arguments.kind:
        case "streams":
            work = keep_streams(*where, request, arguments.streams, arguments.seconds)
        case "rate":
            work = keep_rate(*where, request, arguments.rate, arguments.seconds)
        case "session":
            work = keep_session_rate(arguments.target, arguments.model, arguments.rate, arguments.seconds)
        case "grpc":
            work = keep_grpc_streams(arguments.target, arguments.model, arguments.streams, arguments.seconds)
        case _:
            work = hold(*where, request, arguments.streams)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(work)), flush=True)


if __name__ == "__main__":
    main()
