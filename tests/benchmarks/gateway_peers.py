"""The other ends of the gateway's cost benchmark, each a process: an engine without a model, and what to compare with.

    python tests/benchmarks/gateway_peers.py engine unix:/tmp/engine.sock MODEL
    python tests/benchmarks/gateway_peers.py fake unix:/tmp/engine.sock MODEL
    python tests/benchmarks/gateway_peers.py uvicorn PORT
    python tests/benchmarks/gateway_peers.py grpc ADDRESS

Each writes `ready` and serves until its standard input ends. The engine speaks the session's contract, which is the
router's too: a gateway can't tell. Every step gives each request one token, as fast as the peer reads; each token is
one word with one space before it, so that who reads the text can count tokens by their spaces. `fake` is the tests'
engine, for a router, which asks for more than a session.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from quire.service.checkpoint import load_text, locate
from quire.service.grpc_server import GrpcServer
from quire.v1 import inference_pb2, inference_pb2_grpc, request_pb2, session_pb2, session_pb2_grpc

WORDS = " the quick brown fox jumps over a lazy dog while some people watch from their house"

# An event as the gateway writes it for a chat, and as many of them as a stream has.
EVENT = (
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1700000000,'
    b'"model":"smollm","choices":[{"index":0,"delta":{"content":" quick"},"logprobs":null,"finish_reason":null}]}\n\n'
)

Serve = Callable[[], Coroutine[Any, Any, None]]


class InstantEngine(session_pb2_grpc.SessionServiceServicer):
    """Answers each request at once. One that asks for a single token is held: its stream stays open."""

    def __init__(self, model: str) -> None:
        self._model = model
        tokenizer = load_text(locate("", text_only=True)).tokenizer
        self._tokens = list(tokenizer.encode(WORDS, add_special_tokens=False).ids)

    async def Session(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[session_pb2.SessionRequest], context: Any
    ) -> None:
        """One peer."""
        left: dict[int, int] = {}
        ended: list[int] = []
        work = asyncio.Event()
        await anext(aiter(request_iterator))
        await context.write(session_pb2.SessionResponse(welcome=session_pb2.Welcome(server="i", model=self._model)))
        reading = asyncio.create_task(self._read(request_iterator, left, ended, work))
        fresh: set[int] = set()
        tokens = itertools.cycle(self._tokens)
        try:
            while True:
                await work.wait()
                step = session_pb2.StepFrame()
                token = next(tokens)
                for key in ended:
                    fresh.discard(key)
                    update = step.updates.add(key=key)
                    update.finished.reason = request_pb2.FINISH_REASON_CANCELLED
                ended.clear()
                for key, count in list(left.items()):
                    update = step.updates.add(key=key, token_ids=(token,))
                    if key not in fresh:
                        fresh.add(key)
                        update.started.cached_tokens = 0
                    if count == 0:
                        # Held: one token, and no end until it is cancelled.
                        left.pop(key)
                        continue
                    left[key] = count - 1
                    if count == 1:
                        update.finished.reason = request_pb2.FINISH_REASON_LENGTH
                        fresh.discard(left.pop(key, key))
                if not left and not ended:
                    work.clear()
                await context.write(session_pb2.SessionResponse(step=step))
        finally:
            reading.cancel()

    async def _read(
        self, requests: AsyncIterator[session_pb2.SessionRequest], left: dict[int, int], ended: list[int], work: Any
    ) -> None:
        async for frame in requests:
            match frame.WhichOneof("frame"):
                case "submit":
                    wanted = frame.submit.request.stop.max_tokens
                    left[frame.submit.key] = 0 if wanted == 1 else wanted
                case "cancel":
                    left.pop(frame.cancel.key, None)
                    ended.append(frame.cancel.key)
            work.set()


async def echo_app(scope: Any, receive: Any, send: Any) -> None:
    """A bare ASGI application that streams EVENT: the path is how often."""
    await receive()
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(int(scope["path"][1:])):
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        # As a gateway's task waits for the next step between two events.
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


class EchoInference(inference_pb2_grpc.InferenceServiceServicer):
    """A bare grpc.aio service that streams as many messages as max_tokens says."""

    async def GenerateStream(  # type: ignore[override]  # noqa: N802
        self, request: inference_pb2.GenerateStreamRequest, context: Any
    ) -> None:
        """Messages of the size of the gateway's."""
        for _ in range(request.options.max_tokens):
            message = inference_pb2.GenerateStreamResponse(request_id="gen-0123456789abcdef0123456789abcdef")
            message.text = " quick"
            await context.write(message)


async def serve_engine(address: str, model: str) -> None:
    """Until standard input ends."""
    server = GrpcServer(address)
    name = session_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name
    server.add(name, session_pb2_grpc.add_SessionServiceServicer_to_server, InstantEngine(model))
    await _serve_grpc(server)


async def serve_fake_engine(address: str, model: str) -> None:
    """Until standard input ends."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
    from fake_engine import FakeEngine

    await FakeEngine(address, "engine-0", model=model).start()
    await _until_stdin_ends()


async def serve_grpc_echo(address: str) -> None:
    """Until standard input ends."""
    server = GrpcServer(address)
    name = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
    server.add(name, inference_pb2_grpc.add_InferenceServiceServicer_to_server, EchoInference())
    await _serve_grpc(server)


async def serve_uvicorn(port: int) -> None:
    """Until standard input ends."""
    config = uvicorn.Config(
        echo_app, port=port, http="httptools", ws="none", lifespan="off", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await _until_stdin_ends()
    server.force_exit = server.should_exit = True
    await serving


async def _serve_grpc(server: GrpcServer) -> None:
    await server.start()
    await server.set_serving(True)
    await _until_stdin_ends()
    await server.stop(0)


async def _until_stdin_ends() -> None:
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("engine", "fake"):
        engine = kinds.add_parser(kind)
        engine.add_argument("address")
        engine.add_argument("model")
    kinds.add_parser("uvicorn").add_argument("port", type=int)
    kinds.add_parser("grpc").add_argument("address")
    arguments = parser.parse_args()
    match arguments.kind:
        case "engine":
            serving = serve_engine(arguments.address, arguments.model)
        case "fake":
            serving = serve_fake_engine(arguments.address, arguments.model)
        case "uvicorn":
            serving = serve_uvicorn(arguments.port)
        case _:
            serving = serve_grpc_echo(arguments.address)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serving)


if __name__ == "__main__":
    main()
