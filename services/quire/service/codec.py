"""Prompts to token ids, by a model's tokenizer. The gateway and the offline API encode with it, so they agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quire.service.checkpoint.text import TextModel
from quire.service.errors import InvalidRequestError, ModelError


class PromptCodec:
    """What a model makes of a prompt. Raises ModelError if its tokenizer wants a first token that it does not know."""

    def __init__(self, text: TextModel) -> None:
        self.vocab_size = text.vocab_size
        self._tokenizer = text.tokenizer
        self._prefix = (_bos_token_id(text),) if text.add_bos else ()

    def encode(self, text: str) -> tuple[int, ...]:
        """The tokens of `text` and no others: right for what a chat template wrote."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        """The tokens of a bare prompt, after the first token that the model wants."""
        return self._prefix + self.encode(text)

    def encode_words(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of each word as it is written at the beginning of a text and after a space, where they differ."""
        forms = (self.encode(form) for word in words for form in (word, f" {word.lstrip()}"))
        return tuple(dict.fromkeys(tokens for tokens in forms if tokens))

    def check_token_ids(self, token_ids: Sequence[int], field: str) -> None:
        """Raises InvalidRequestError, naming the place in `field`, if one is not among the model's tokens."""
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self.vocab_size):
            index = next(i for i, token_id in enumerate(token_ids) if not 0 <= token_id < self.vocab_size)
            raise InvalidRequestError(
                f"{field}[{index}] is {token_ids[index]}: this model's token ids lie in [0, {self.vocab_size - 1}]",
                field=f"{field}[{index}]",
            )


def _bos_token_id(text: TextModel) -> int:
    token_id = text.tokenizer.token_to_id(text.bos_token) if text.bos_token else None
    if token_id is None:
        raise ModelError(f"the tokenizer wants a first token, {text.bos_token!r}, but does not know it")
    return token_id
