"""Token ids to text, piece by piece: the incremental detokenizer and the matcher of stop strings.

The gateway and the offline API run both for every token, so they do little: a list lookup and one step of an
incremental UTF-8 decoder; stop strings cost a step of a Knuth-Morris-Pratt automaton per character and only where a
request has any.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer

from quire.service.errors import ModelError

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Pieces:
    """What each token id contributes to the text, in bytes. One per model, shared by all its requests.

    Special tokens and `silent_ids` (the model's end tokens) contribute nothing, but for the special tokens that
    `visible` has. Known are the decoders of byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and of SentencePiece (Llama
    2, Mistral). Raises ModelError for any other.
    """

    def __init__(self, tokenizer: Tokenizer, silent_ids: Iterable[int] = (), *, visible: Collection[str] = ()) -> None:
        self.leading = ""
        convert = self._converter(_decoder_steps(tokenizer))
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        special = {token_id for token_id, token in added.items() if token.special and token.content not in visible}
        silent = special | set(silent_ids)
        self._bytes = [b""] * (max(vocab.values(), default=-1) + 1)
        self._silent: dict[int, bytes] = {}
        for token, token_id in vocab.items():
            if token_id not in silent:
                self._bytes[token_id] = convert(token)
            else:
                self._silent[token_id] = token.encode()

    def bytes_of(self, token_ids: Sequence[int]) -> bytes:
        """The bytes of `token_ids`, concatenated; ids beyond the vocabulary have none."""
        table, size = self._bytes, len(self._bytes)
        if len(token_ids) == 1:
            return table[token_ids[0]] if token_ids[0] < size else b""
        return b"".join([table[token_id] for token_id in token_ids if token_id < size])

    def shown(self, token_id: int) -> bytes:
        """The token itself, for lists of tokens: what it contributes, or the name of one that contributes nothing."""
        return self._silent.get(token_id) or self.bytes_of((token_id,))

    def _converter(self, steps: list[dict[str, Any]]) -> Callable[[str], bytes]:
        kinds = {step["type"] for step in steps}
        if kinds == {"ByteLevel"}:
            return _byte_level_bytes
        replacements: list[tuple[str, str]] = []
        byte_fallback = False
        for step in steps:
            match step:
                case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
                    replacements.append((pattern, content))
                case {"type": "Metaspace", "replacement": str(replacement)}:
                    replacements.append((replacement, " "))
                    self.leading = "" if step.get("prepend_scheme") == "never" else " "
                case {"type": "Strip", "content": str(content), "start": int(start), "stop": 0}:
                    self.leading = content * start
                case {"type": "ByteFallback"}:
                    byte_fallback = True
                case {"type": "Fuse"}:
                    pass
                case _:
                    raise ModelError(f"the tokenizer has a decoder of type {step['type']}, which is not supported")
        return lambda token: _sentence_piece_bytes(token, replacements, byte_fallback)


class Detokenizer:
    """One request's output as text; never emits part of a character.

    The concatenation of all it returns equals `tokenizer.decode` of all tokens, whatever the bytes: incomplete or
    invalid UTF-8 becomes U+FFFD. (One exception: SentencePiece's byte tokens, where one invalid byte makes
    `tokenizer.decode` give up the whole run around it; here the run's valid characters stay.) `strip_leading` drops
    the space that SentencePiece puts before a text's first word: right for a chat's answer, wrong for a completion,
    which goes on in the middle of a text.
    """

    def __init__(self, pieces: Pieces, *, strip_leading: bool = False) -> None:
        self._pieces = pieces
        self._decoder = _utf8_decoder("replace")
        self._leading = pieces.leading if strip_leading else ""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now and was not before; the bytes of an unfinished character wait."""
        text = self._decoder.decode(self._pieces.bytes_of(token_ids))
        return self._strip(text) if self._leading and text else text

    def flush(self) -> str:
        """What an unfinished last character is shown as. Call it once, after the last token."""
        return self._decoder.decode(b"", True)

    def _strip(self, text: str) -> str:
        while text and self._leading:
            if not text.startswith(self._leading[0]):
                self._leading = ""
                break
            text, self._leading = text[1:], self._leading[1:]
        return text


class StopMatcher:
    """Cuts a text at the first stop string, wherever the text's pieces begin and end.

    The match that ends first wins, and of those that end together the longest. Text is held back only while it could
    still become a stop string. Knuth-Morris-Pratt: each character costs amortized constant time per stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        # Longest first, so that the first to match at a position is the longest.
        self._stops = sorted(stops, key=len, reverse=True)
        self._fallbacks = [_fallback_table(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._first = frozenset(stop[0] for stop in self._stops)
        self._held = ""
        self.stopped = False
        self.stop_string: str | None = None

    def feed(self, text: str) -> str:
        """The text that is certainly no part of a stop string; sets `stopped` and `stop_string` at a complete one."""
        if not self._held and self._first.isdisjoint(text):
            return text
        pending = self._held + text
        for position in range(len(self._held), len(pending)):
            if length := self._step(pending[position]):
                self.stopped = True
                self._held = ""
                self.stop_string = pending[position + 1 - length : position + 1]
                return pending[: position + 1 - length]
        keep = max(self._matched, default=0)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def flush(self) -> str:
        """The text held back, once nothing more can follow."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> int:
        found = 0
        for index, stop in enumerate(self._stops):
            matched, fallback = self._matched[index], self._fallbacks[index]
            while matched and stop[matched] != character:
                matched = fallback[matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                found = found or matched
                matched = fallback[matched - 1]
            self._matched[index] = matched
        return found


class OutputText:
    """One output as text while its tokens come, cut before the first stop string.

    The first `min_tokens` tokens are not searched for stop strings. `num_characters` counts those of the whole text,
    before it is cut.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = (), *, min_tokens: int = 0) -> None:
        self.num_tokens = 0
        self.num_characters = 0
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stop) if stop else None
        self._min_tokens = min_tokens

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text; what follows it is not taken any more."""
        return self._matcher.stop_string if self._matcher is not None else None

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now; `num_tokens` counts all tokens, up to the one that completed a stop string."""
        if self._matcher is None:
            self.num_tokens += len(token_ids)
            text = self._detokenizer.feed(token_ids)
            self.num_characters += len(text)
            return text
        text = ""
        for token_id in token_ids:
            if self._matcher.stopped:
                break
            self.num_tokens += 1
            piece = self._detokenizer.feed((token_id,))
            self.num_characters += len(piece)
            text += piece if self.num_tokens <= self._min_tokens else self._matcher.feed(piece)
        return text

    def flush(self) -> str:
        """The text that was held back. Call it once, after the last token."""
        if self._matcher is None:
            return self._detokenizer.flush()
        if self._matcher.stopped:
            return ""
        text = self._matcher.feed(self._detokenizer.flush())
        return text + self._matcher.flush()


def _fallback_table(pattern: str) -> list[int]:
    """For each prefix of `pattern`, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = table[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        table[index] = length
    return table


def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    decoder = tokenizer.decoder
    if decoder is None:
        raise ModelError("the tokenizer has no decoder, so its tokens can't be turned into text")
    state: dict[str, Any] = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    return steps


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's mapping of characters to bytes: printable ones stand for themselves, the others are moved up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(moved)}


_BYTE_LEVEL = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_LEVEL[character] for character in token])
    except KeyError:  # an added token is plain text
        return token.encode()


def _sentence_piece_bytes(token: str, replacements: list[tuple[str, str]], byte_fallback: bool) -> bytes:
    if byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    for pattern, content in replacements:
        token = token.replace(pattern, content)
    return token.encode()
