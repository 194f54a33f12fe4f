"""What to generate: the arguments of vLLM's SamplingParams, turned into the contract's."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.llm.arguments import ArgumentError, Unsupported, check_number, named_arguments, without_prefix
from quire.service import request as contract
from quire.service.errors import InvalidRequestError

if TYPE_CHECKING:
    from quire.service.codec import PromptCodec

_UNSUPPORTED: Unsupported = {
    "allowed_token_ids": ((None,), "use logit_bias or structured_outputs"),
    "best_of": ((None, 1), "set n and choose among the outputs"),
    "detokenize": ((True,), "leave it out; token_ids are there beside the text"),
    "extra_args": ((None,), "leave it out"),
    "flat_logprobs": ((False,), "leave it out"),
    "guided_decoding": ((None,), "it is called structured_outputs"),
    "logits_processors": ((None,), "use logit_bias, bad_words or structured_outputs"),
    "output_kind": ((None,), "leave it out: outputs come whole"),
    "skip_special_tokens": ((True,), "leave it out; special tokens are in token_ids"),
    "spaces_between_special_tokens": ((True, False), "leave it out"),
    "truncate_prompt_tokens": ((None,), "shorten the prompt"),
}


@named_arguments(_UNSUPPORTED)
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when an output ends. Raises InvalidRequestError that names the argument.

    n: outputs per prompt; they share the prompt's pages.
    temperature: 0 is greedy. top_k: 0 and -1 are off.
    seed: the same seed gives the same output whatever else is in the batch; output i of n draws with seed + i. None
        takes the next one of the LLM's own.
    stop: strings that end the output; they are cut off unless `include_stop_str_in_output`.
    max_tokens: None is as many as the context holds.
    logprobs, prompt_logprobs: how many of the most likely tokens to report for each token; 0 is the token's own alone.
    bad_words: words that must not come; logit_bias: token id → what is added to its logit.
    structured_outputs: a StructuredOutputsParams, or a Python type (a Pydantic model, a dataclass, a Literal, …).
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] | None = None
    structured_outputs: Any = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            check_number(name, getattr(self, name))
        for name in ("n", "top_k", "min_tokens"):
            check_number(name, getattr(self, name), whole=True)
        for name in ("seed", "max_tokens", "logprobs", "prompt_logprobs"):
            check_number(name, getattr(self, name), whole=True, optional=True)
        if self.n < 1:
            raise InvalidRequestError(f"n is {self.n}: it must be at least 1", field="n")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise InvalidRequestError(f"seed is {self.seed}: it must have at most 64 bits", field="seed")
        for name, words in (("stop", self.stop_strings), ("bad_words", self.bad_words or ())):
            if isinstance(words, str) or not all(isinstance(word, str) for word in words):
                raise ArgumentError(f"{name} is {words!r}: give a list of strings", field=name)
            if not all(words):
                raise InvalidRequestError(f"{name} holds an empty string: remove it", field=name)
        _check_token_ids(self)
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and not 0 <= count <= contract.MAX_LOGPROBS:
                raise InvalidRequestError(f"{name} is {count}: it must lie in [0, {contract.MAX_LOGPROBS}]", field=name)
        try:
            self._sampling(0, ())
            self.stop_conditions(contract.MAX_TOKEN_ID)
        except InvalidRequestError as error:
            raise without_prefix(error) from error

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, seed: int, codec: PromptCodec) -> contract.SamplingParams:
        """The contract's parameters of an output that draws with `seed`; raises InvalidRequestError."""
        try:
            return self._sampling(seed, codec.encode_words(self.bad_words or ()))
        except InvalidRequestError as error:
            raise without_prefix(error) from error

    def stop_conditions(self, room: int) -> contract.StopConditions:
        """The contract's conditions in a context with `room` for that many tokens of output."""
        return contract.StopConditions(
            max_tokens=room if self.max_tokens is None else self.max_tokens,
            stop_token_ids=tuple(map(operator.index, self.stop_token_ids or ())),
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
        )

    def _sampling(self, seed: int, bad_words: tuple[tuple[int, ...], ...]) -> contract.SamplingParams:
        return contract.SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0) if self.top_k >= -1 else self.top_k,
            seed=seed,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple((int(token), float(bias)) for token, bias in (self.logit_bias or {}).items()),
            bad_words=bad_words,
        )


def _check_token_ids(params: SamplingParams) -> None:
    stop_token_ids, logit_bias = params.stop_token_ids, params.logit_bias
    try:
        tuple(operator.index(token_id) for token_id in stop_token_ids or ())
    except TypeError as error:
        raise ArgumentError(f"stop_token_ids is {stop_token_ids!r}: give token ids", field="stop_token_ids") from error
    try:
        {int(token_id): float(bias) for token_id, bias in (logit_bias or {}).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ArgumentError(f"logit_bias is {logit_bias!r}: give token ids and numbers", field="logit_bias") from error
