"""API keys: who comes in, within which limits, and what a change of their file does, over real sockets."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from fake_router import Answer, FakeRouter
from gateway_testing import ANSWER, MODEL, StartGateway, eventually, until_ready

from quire.gateway.access.keys import digest_of, load_keys, new_key
from quire.gateway.server import Gateway
from quire.service.errors import ConfigError
from quire.service.grpc_server import channel
from quire.service.request import FinishReason
from quire.v1 import inference_pb2, inference_pb2_grpc

COMPLETION = {"model": MODEL, "prompt": "Hi"}
CHAT: Any = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


def line(key: str, tenant: str = "acme", **fields: Any) -> str:
    """A line of the key file."""
    return json.dumps({"hash": f"sha256:{digest_of(key).hex()}", "tenant": tenant, **fields}) + "\n"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


class KeyFile:
    """A key file in a folder as Kubernetes mounts a Secret: a link to a link that is switched."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._version = 0
        self.path = folder / "keys.jsonl"
        self.path.symlink_to(Path("..data") / "keys.jsonl")

    def write(self, *lines: str) -> None:
        self._version += 1
        version = self._folder / f"..{self._version}"
        version.mkdir()
        (version / "keys.jsonl").write_text("# keys\n\n" + "".join(lines))
        link = self._folder / "..next"
        link.symlink_to(version.name)
        link.replace(self._folder / "..data")


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    folder = tmp_path / "secret"
    folder.mkdir()
    return KeyFile(folder)


@pytest.fixture
def start(start_gateway: StartGateway, router: FakeRouter, keys: KeyFile) -> Callable[..., Any]:
    """A gateway with the key file, and a client without a key."""

    async def start(*lines: str, **config: Any) -> tuple[Gateway, httpx.AsyncClient]:
        keys.write(*lines)
        gateway = await start_gateway(router.address, api_keys=str(keys.path), reload_interval=0.02, **config)
        async with httpx.AsyncClient(base_url=gateway.url) as http:
            await until_ready(http)
        return gateway, httpx.AsyncClient(base_url=gateway.url, timeout=20)

    return start


@pytest.fixture
def by_hand() -> None:
    """Marks tests that answer as the router themselves."""


@pytest.fixture
def answer(request: pytest.FixtureRequest, answer: Answer) -> Answer | None:
    return None if "by_hand" in request.fixturenames else answer


async def status(http: httpx.AsyncClient, key: str) -> int:
    return (await http.get("/v1/models", headers=bearer(key))).status_code


async def test_nobody_comes_in_without_a_key(start: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """Without it a gateway with a key file could still answer strangers on some route."""
    caplog.set_level(logging.DEBUG)
    key = new_key()
    _, http = await start(line(key))
    async with http:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/x", "/", "/no/such/page"):
            for headers in ({}, bearer("quire-wrong"), {"authorization": key}, {"authorization": f"Basic {key}"}):
                answer = await http.request("POST" if "completions" in path else "GET", path, headers=headers)
                assert answer.status_code == 401, path
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert "Authorization: Bearer KEY" in answer.json()["error"]["message"]
                assert answer.headers["x-request-id"]
        for path in ("/health", "/ready", "/metrics"):
            assert (await http.get(path)).status_code == 200
        assert 'quire_gateway_refusals_total{reason="unknown_key",tenant=""}' in (await http.get("/metrics")).text
        assert await status(http, key) == 200
        assert (await http.post("/v1/completions", json=COMPLETION, headers=bearer(key))).status_code == 200
    # Nor is a key given away by the log.
    assert caplog.records and not any(key in str(vars(record)) for record in caplog.records)


async def test_openai_client_and_its_errors(start: Callable[..., Any]) -> None:
    """Without it the official client would not know a refusal for what it is."""
    key = new_key()
    gateway, http = await start(line(key, requests_per_minute=1))
    async with http, openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
        raw = await client.chat.completions.with_raw_response.create(**CHAT)
        assert raw.parse().choices[0].message.content == ANSWER
        assert raw.headers["x-ratelimit-limit-requests"] == "1"
        assert raw.headers["x-ratelimit-remaining-requests"] == "0"
        assert raw.headers["x-ratelimit-reset-requests"].endswith("s")
        with pytest.raises(openai.RateLimitError, match="1 requests a minute") as error:
            await client.chat.completions.create(**CHAT)
        assert 1 <= int(error.value.response.headers["retry-after"]) <= 60
        assert error.value.response.headers["x-ratelimit-remaining-requests"] == "0"
        # What does not generate costs the gateway as well.
        assert (await http.post("/tokenize", json={"prompt": "Hi"}, headers=bearer(key))).status_code == 429
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="sk-unknown").models.list()


async def test_grpc(start: Callable[..., Any]) -> None:
    """Without it the keys would guard one door of two."""
    key = new_key()
    gateway, http = await start(line(key, requests_per_minute=1))
    request = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text="Hi"))
    async with http, channel(gateway.grpc_address) as dialed:
        stub = inference_pb2_grpc.InferenceServiceStub(dialed)
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            for call in (
                stub.Generate(request, metadata=metadata),
                stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call
                assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
            stream = stub.GenerateStream(inference_pb2.GenerateStreamRequest(), metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stream.read()
            assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", f"Bearer {key}"),)
        assert (await stub.Generate(request, metadata=metadata)).choices[0].text
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Generate(request, metadata=metadata)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "1 requests a minute" in str(error.value.details())
        assert int(dict(error.value.trailing_metadata() or ())["retry-after"]) >= 1


async def test_file_is_reloaded_and_a_broken_one_is_not(
    start: Callable[..., Any], keys: KeyFile, caplog: pytest.LogCaptureFixture
) -> None:
    """Without it a revoked key would go on working, or a typo in the file would lock everybody out."""
    old, new = new_key(), new_key()
    _, http = await start(line(old))
    async with http:
        assert (await status(http, old), await status(http, new)) == (200, 401)
        keys.write(line(new))
        await eventually(lambda: status(http, new), lambda code: code == 200)
        assert await status(http, old) == 401
        keys.write(line(new), "not json\n")

        async def metrics() -> str:
            return (await http.get("/metrics")).text

        shown = await eventually(metrics, lambda text: 'file_stale{file="api_keys"} 1.0' in text)
        assert 'reloads_total{file="api_keys",outcome="failed"} 1.0' in shown
        assert 'reloads_total{file="api_keys",outcome="ok"} 1.0' in shown
        assert await status(http, new) == 200
        assert "line 4" in caplog.text and "the old one stays" in caplog.text
        keys.write(line(old))
        await eventually(lambda: status(http, old), lambda code: code == 200)
        assert 'file_stale{file="api_keys"} 0.0' in await metrics()


async def test_tenants_share_no_pages(start: Callable[..., Any], router: FakeRouter) -> None:
    """Without it one tenant's latency would tell what another has asked, or a chosen salt would reach its pages."""
    first, second, longer = new_key(), new_key(), new_key()
    _, http = await start(line(first, "a"), line(second, "ab"), line(longer, "a.b"))
    salts = []
    async with http:
        for key, salt in ((first, None), (first, "x"), (second, None), (second, "x"), (longer, None), (longer, "1:a:")):
            body = COMPLETION | ({"cache_salt": salt} if salt else {})
            assert (await http.post("/v1/completions", json=body, headers=bearer(key))).status_code == 200
            salts.append((await router.next()).request.cache_key.salt)
        assert len(set(salts)) == len(salts)
        await http.post("/v1/completions", json=COMPLETION, headers=bearer(first))
        assert (await router.next()).request.cache_key.salt == salts[0]


async def test_models_expiry_and_priority(start: Callable[..., Any]) -> None:
    """Without it a key could do what it was not given for."""
    narrow, dead = new_key(), new_key()
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    _, http = await start(line(narrow, models=[MODEL], max_priority=2), line(dead, expires=past))
    async with http:
        assert await status(http, dead) == 401
        listed = (await http.get("/v1/models", headers=bearer(narrow))).json()["data"]
        assert [model["id"] for model in listed] == [MODEL]
        for method, path, body in (
            ("GET", "/v1/models/alias/with-slash", None),
            ("POST", "/v1/completions", COMPLETION | {"model": "alias/with-slash"}),
        ):
            answer = await http.request(method, path, json=body, headers=bearer(narrow))
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
        for priority, expected in ((2, 200), (3, 400)):
            answer = await http.post(
                "/v1/completions", json=COMPLETION | {"priority": priority}, headers=bearer(narrow)
            )
            assert answer.status_code == expected
        assert answer.json()["error"]["param"] == "priority"


async def test_token_rate(start: Callable[..., Any]) -> None:
    """Without it outputs would be free, or a prompt that can never pass be retried for ever."""
    key = new_key()
    _, http = await start(line(key, tokens_per_minute=10))
    async with http:
        answer = await http.post("/v1/completions", json=COMPLETION, headers=bearer(key))
        assert answer.status_code == 200
        used = answer.json()["usage"]["total_tokens"]
        assert used > 4
        # The head went out when the prompt was charged, the tokens of the output came after it.
        answer = await http.post("/v1/completions", json=COMPLETION | {"prompt": [1] * 10}, headers=bearer(key))
        assert answer.status_code == 429
        assert "10 tokens a minute" in answer.json()["error"]["message"]
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) <= 10 - used + 1
        answer = await http.post("/v1/completions", json=COMPLETION | {"prompt": [1] * 11}, headers=bearer(key))
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"
        shown = (await http.get("/metrics")).text
        assert f'tenant_tokens_total{{direction="output",tenant="acme"}} {used - 1}.0' in shown


@pytest.mark.usefixtures("by_hand")
async def test_concurrency(start: Callable[..., Any], router: FakeRouter) -> None:
    """Without it one key could hold every place, or lose places for good with the clients that went away."""
    key, other = new_key(), new_key()
    _, http = await start(line(key, concurrency=1), line(other, concurrency=1))

    async def ask(who: str) -> httpx.Response:
        return await http.post("/v1/completions", json=COMPLETION, headers=bearer(who))

    async with http:
        first = asyncio.create_task(ask(key))
        held = await router.next()
        answer = await ask(key)
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert "concurrency" in answer.json()["error"]["message"]
        second = asyncio.create_task(ask(other))
        (await router.next()).send(cached=0, finish=FinishReason.STOP)
        assert (await second).status_code == 200
        first.cancel()
        await asyncio.wait_for(held.cancelled.wait(), 10)

        third = asyncio.create_task(ask(key))
        (await router.next()).send(cached=0, finish=FinishReason.STOP)
        assert (await third).status_code == 200


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1"),
        ('{"hash": "sha256:00", "tenant": "a"}', "hash must be"),
        ('{"tenant": "a"}', "hash"),
        ("[" * 100_000, "line 1"),
        (line("k", ""), "tenant"),
        (line("k", "a b"), "tenant"),
        (line("k", tenants="b"), "tenants"),
        (line("k", concurrency=0), "concurrency is 0"),
        (line("k", requests_per_minute="9"), "requests_per_minute"),
        (line("k", models=[]), "models is empty"),
        (line("k", expires="2030-01-01T00:00:00"), "offset"),
        (line("k") + line("k"), "line 2: the hash is there twice"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, text: str, said: str) -> None:
    """Without it an operator would learn of a typo from locked-out users."""
    file = tmp_path / "keys.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match="--api-keys") as error:
        load_keys(str(file))
    assert said in error.value.message


def test_a_key_in_the_file_is_not_repeated_in_the_error(tmp_path: Path) -> None:
    """Without it a key that was put there by mistake would end up in the log as well."""
    file = tmp_path / "keys.jsonl"
    key = new_key()
    for text in (key, json.dumps({"hash": key, "tenant": "a"}), json.dumps({"key": key})):
        file.write_text(text)
        with pytest.raises(ConfigError) as error:
            load_keys(str(file))
        assert key not in error.value.message
    with pytest.raises(ConfigError, match="can't read"):
        load_keys(str(tmp_path / "missing"))


def test_made_keys_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it the line that `quire keys` prints could be one that a gateway refuses."""
    from quire.cli.keys import main

    assert main(["--tenant", "acme", "--requests-per-minute", "5", "--days", "1", "--model", "m"]) == 0
    shown = capsys.readouterr()
    key = shown.err.split()[-1]
    assert key not in shown.out
    file = tmp_path / "keys.jsonl"
    file.write_text(shown.out)
    found = load_keys(str(file)).find(key)
    assert found is not None and not found.expired
    assert (found.tenant, found.requests_per_minute, found.models) == ("acme", 5, frozenset({"m"}))
    assert main(["--check", str(file)]) == 0
    assert "1 keys" in capsys.readouterr().out
    for wrong in ([], ["--tenant", "a b"], ["--tenant", "a", "--concurrency", "0"]):
        with pytest.raises(ConfigError):
            main(wrong)
