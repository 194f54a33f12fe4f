"""What tests of the gateway share: names, a vocabulary, and waiting for what only shows from outside."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE

from quire.gateway.server import Gateway

MODEL = "smollm"
ANSWER = "The capital of France is Paris."

T = TypeVar("T")
StartGateway = Callable[..., Awaitable[Gateway]]


def sentence_piece() -> Tokenizer:
    """A vocabulary as Llama 2 has it: words with a lower bar for the space, and byte tokens."""
    words = ["<s>", "</s>", "▁Hello", "▁world", "!", "▁", "lo", "▁▁", "é"]
    vocab = {word: index for index, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(BPE(vocab, [], byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


async def eventually(probe: Callable[[], Awaitable[T]], accept: Callable[[T], bool]) -> T:
    """Asks until the answer is accepted: for what can only be seen from outside."""
    async with asyncio.timeout(10):
        while True:
            answer = await probe()
            if accept(answer):
                return answer
            await asyncio.sleep(0.01)


async def until_ready(http: httpx.AsyncClient, status: int = 200, reason: str = "") -> None:
    """Returns when /ready answers `status`, with `reason` among the reasons."""
    await eventually(lambda: http.get("/ready"), lambda answer: answer.status_code == status and reason in answer.text)
