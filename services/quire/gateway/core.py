"""What the gateway does, without HTTP or gRPC: a prompt and options become Generations, a Generation becomes text.

Both servers (`http`, `grpc_api`) do the same three things: `prepare` what the client asked for, `open` an Output and
read it. Leaving the Output's `with` block early cancels what is still running, so a client that goes away frees its
pages within one step.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

from quire.gateway.errors import ContextLengthError
from quire.gateway.grammar import compose
from quire.gateway.model import Conversation, Prompt, ServedModel, Tokenized
from quire.gateway.options import Options
from quire.gateway.output import Generation, Operation, Output
from quire.gateway.session import RouterSessions
from quire.gateway.stream import Echo, Shown
from quire.gateway.tools.choice import ToolChoice
from quire.service.errors import InvalidRequestError, error_of
from quire.service.request import CacheKey, Constraint, Request, SamplingParams, StopConditions, TraceContext

_COMPLETION_MAX_TOKENS = 16


class Core:
    """One model behind some routers."""

    def __init__(self, model: ServedModel, sessions: RouterSessions) -> None:
        self.model = model
        self._sessions = sessions

    @property
    def ready(self) -> bool:
        """Whether a request would be taken now, and not have to wait for a router."""
        return self._sessions.ready

    @property
    def router_states(self) -> dict[str, str]:
        """For each router's address "ready", or why it can't take a request now."""
        return self._sessions.states

    async def prepare(
        self,
        request_id: str,
        prompt: Prompt,
        options: Options,
        *,
        trace: TraceContext,
        deadline_unix_ms: int | None = None,
    ) -> list[Generation]:
        """Tokenizes `prompt` and fills in all defaults; as many Generations as `options.n`.

        Raises InvalidRequestError and ContextLengthError, whose field is `prompt`, `messages` or an option's name.
        """
        tokenized = await self.model.tokenize(prompt)
        chat = isinstance(prompt, Conversation)
        if not tokenized.token_ids:
            field = "messages" if chat else "prompt"
            raise InvalidRequestError(f"{field} is empty: send at least one token", field=field)
        tools = prompt.tools if isinstance(prompt, Conversation) else ToolChoice()
        request = Request(
            request_id=request_id,
            model=self.model.name,
            prompt_token_ids=tokenized.token_ids,
            sampling=self._sampling(options),
            stop=self._stop(options, len(tokenized.token_ids), chat),
            constraint=self._constraint(options, tokenized, tools),
            cache_key=CacheKey(salt=options.cache_salt),
            priority=options.priority,
            deadline_unix_ms=deadline_unix_ms,
            trace=trace,
            logprobs=options.logprobs,
            prompt_logprobs=_prompt_logprobs(options),
        )
        generation = Generation(
            Operation.CHAT if chat else Operation.TEXT_COMPLETION,
            request,
            self._shown(options, prompt, tokenized),
            thinking=tokenized.thinking,
            tools=tuple(tool.name for tool in tools.tools),
        )
        return [_choice(generation, index) for index in range(options.n)] if options.n > 1 else [generation]

    def open(self, generations: Sequence[Generation], progress: Callable[[int], None]) -> Output:
        """The output of `generations`, which are sent when it is entered."""
        return Output(self._sessions, self.model, generations, progress)

    def _sampling(self, options: Options) -> SamplingParams:
        self._check_token_ids("logit_bias", [token_id for token_id, _ in options.logit_bias])
        return SamplingParams(
            temperature=1.0 if options.temperature is None else options.temperature,
            top_p=1.0 if options.top_p is None else options.top_p,
            top_k=max(options.top_k or 0, 0),
            seed=secrets.randbits(63) if options.seed is None else options.seed % 2**64,
            min_p=options.min_p or 0.0,
            presence_penalty=options.presence_penalty or 0.0,
            frequency_penalty=options.frequency_penalty or 0.0,
            repetition_penalty=1.0 if options.repetition_penalty is None else options.repetition_penalty,
            logit_bias=options.logit_bias,
            bad_words=self.model.codec.encode_words(options.bad_words),
        )

    def _stop(self, options: Options, prompt_tokens: int, chat: bool) -> StopConditions:
        self._check_token_ids("stop_token_ids", options.stop_token_ids)
        max_tokens = self._max_tokens(options, prompt_tokens, chat)
        if options.min_tokens > max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {options.min_tokens} and there is room for {max_tokens} tokens: set it to at most that",
                field="min_tokens",
            )
        return StopConditions(max_tokens, options.stop_token_ids, options.min_tokens, options.ignore_eos)

    def _check_token_ids(self, name: str, token_ids: Sequence[int]) -> None:
        size = self.model.codec.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < size:
                raise InvalidRequestError(
                    f"{name} has token {token_id}: this model's token ids lie in [0, {size - 1}]", field=name
                )

    def _constraint(self, options: Options, tokenized: Tokenized, tools: ToolChoice) -> Constraint | None:
        model = self.model
        try:
            constraint = compose(options.constraint, tokenized.thinking, tools, model.tool_format, model.lark_literal)
        except InvalidRequestError as error:
            message = error.message.replace(error.field, options.constraint_field, 1)
            raise error_of(error.code, message, options.constraint_field) from error
        except RecursionError as error:
            name = options.constraint_field if options.constraint is not None else "tools"
            raise InvalidRequestError(f"{name} is nested too deeply: flatten it", field=name) from error
        if constraint is not None and options.ignore_eos:
            raise InvalidRequestError(
                "ignore_eos is set and the tools hold the output to a grammar, whose end is the model's end token: "
                "leave one of them out",
                field="ignore_eos",
            )
        return constraint

    def _shown(self, options: Options, prompt: Prompt, tokenized: Tokenized) -> Shown:
        ends = set(options.stop_token_ids)
        if not options.ignore_eos:
            ends.update(self.model.end_token_ids)
        return Shown(
            stop=options.stop,
            end_token_ids=frozenset(ends),
            echo=self._echo(options, prompt, tokenized.token_ids) if options.echo else None,
            without_output=options.max_tokens == 0,
            prompt_logprobs=options.prompt_logprobs is not None,
            constraint_field="tools" if options.constraint is None else options.constraint_field,
        )

    def _echo(self, options: Options, prompt: Prompt, token_ids: Sequence[int]) -> Echo:
        detokenizer = self.model.detokenizer(strip_leading=True)
        offsets, texts, length = [], [], 0
        for token_id in token_ids:
            offsets.append(length)
            texts.append(detokenizer.feed((token_id,)))
            length += len(texts[-1])
        text = prompt if isinstance(prompt, str) else "".join([*texts, detokenizer.flush()])
        return Echo(text, tuple(offsets))

    def _max_tokens(self, options: Options, prompt_tokens: int, chat: bool) -> int:
        context, asked = self.model.max_model_len, options.max_tokens
        room = context - prompt_tokens
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {prompt_tokens} tokens and the model's context holds {context}, output included: "
                f"shorten the prompt by at least {1 - room} tokens",
                field="messages" if chat else "prompt",
            )
        if asked is None:
            return room if chat else min(_COMPLETION_MAX_TOKENS, room)
        if asked > room:
            raise ContextLengthError(
                f"max_tokens is {asked} and the prompt has {prompt_tokens} tokens, together more than the model's "
                f"context of {context}: set max_tokens to at most {room} or shorten the prompt",
                field="max_tokens",
            )
        # The prompt is computed for the sake of an output: one token is the least, and is not shown.
        return max(asked, 1)


def _prompt_logprobs(options: Options) -> int | None:
    wanted = [options.prompt_logprobs, options.logprobs if options.echo else None]
    return max((count for count in wanted if count is not None), default=None)


def _choice(generation: Generation, index: int) -> Generation:
    request = generation.request
    sampling = replace(request.sampling, seed=(request.sampling.seed + index) % 2**64)
    request = replace(request, request_id=f"{request.request_id}-{index}", sampling=sampling)
    return replace(generation, request=request, choice=index)
