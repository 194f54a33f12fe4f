"""POST /tokenize and POST /detokenize, as vLLM has them: what the model makes of a text, without generating."""

from __future__ import annotations

import msgspec
from starlette.types import Receive, Scope, Send

from quire.gateway.access.gate import Caller, Gate
from quire.gateway.exchange import Exchange
from quire.gateway.http_completions import HttpLimits
from quire.gateway.http_errors import answer_error
from quire.gateway.model import ServedModel
from quire.gateway.openai.answers import DetokenizeAnswer, TokenizeAnswer
from quire.gateway.openai.requests import parse_detokenize, parse_tokenize
from quire.service.errors import QuireError


class _Route:
    def __init__(self, model: ServedModel, gate: Gate, limits: HttpLimits) -> None:
        self._model = model
        self._gate = gate
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller: Caller = scope["quire.caller"]
        exchange = Exchange(scope, receive, send, lambda: self._gate.headers(caller))
        try:
            with self._gate.enter(caller):
                raw = await exchange.body(self._limits.max_body_bytes, self._limits.read_timeout)
                body = msgspec.json.encode(await self._answer(raw, caller))
        except QuireError as error:
            await answer_error(exchange, error)
            return
        await exchange.start(200, {"content-type": "application/json", "content-length": str(len(body))})
        await exchange.finish(body)

    async def _answer(self, raw: bytes, caller: Caller) -> msgspec.Struct:
        raise NotImplementedError

    def _check_name(self, name: str | None, caller: Caller) -> None:
        if name is not None:
            self._model.check_name(name)
        caller.check_model(name or self._model.name)


class Tokenize(_Route):
    """A prompt or a conversation to token ids."""

    async def _answer(self, raw: bytes, caller: Caller) -> TokenizeAnswer:
        request = parse_tokenize(raw)
        self._check_name(request.model, caller)
        tokenized = await self._model.tokenize(request.prompt, special_tokens=request.special_tokens)
        token_ids = list(tokenized.token_ids)
        strings = self._model.token_strings(token_ids) if request.token_strings else None
        return TokenizeAnswer(len(token_ids), self._model.max_model_len, token_ids, strings)


class Detokenize(_Route):
    """Token ids to text."""

    async def _answer(self, raw: bytes, caller: Caller) -> DetokenizeAnswer:
        request = parse_detokenize(raw)
        self._check_name(request.model, caller)
        self._model.codec.check_token_ids(request.tokens, "tokens")
        return DetokenizeAnswer(await self._model.detokenize(request.tokens))
