"""Fields of OpenAI's and vLLM's APIs that are known and not done: refused by name, unless they say "off".

`requests` checks every decoded struct with `refuse`; `openapi` says on its page what passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from quire.service.errors import InvalidRequestError

# The values that mean "off", which pass, and what to do about all others.
NotDone = Mapping[str, tuple[tuple[Any, ...], str]]

IN_BODIES: NotDone = {
    "add_special_tokens": ((), "leave it out: a chat's template writes its own, a bare prompt gets the model's first"),
    "allowed_token_ids": (([],), "constrain the output with structured_outputs, or use logit_bias"),
    "audio": ((), "leave it out: the answer is text"),
    "chat_template": ((), "leave it out: the model's own is used, with chat_template_kwargs"),
    "documents": (([],), "put them into the messages"),
    "early_stopping": ((False,), "leave it out: there is no beam search"),
    "function_call": (("none", "auto"), "use tool_choice"),
    "functions": (([],), "use tools"),
    "guided_decoding_backend": ((), "leave it out: there is one backend"),
    "guided_whitespace_pattern": ((), "leave it out: JSON has at most one blank after a comma or a colon"),
    "include_reasoning": ((True,), "leave it out and ignore reasoning_content"),
    "include_stop_str_in_output": ((False,), "append the stop string yourself"),
    "kv_transfer_params": ((), "leave it out"),
    "length_penalty": ((1, 1.0), "leave it out: there is no beam search"),
    "logits_processors": (([],), "use logit_bias, bad_words or structured_outputs"),
    "mm_processor_kwargs": ((), "leave it out: only text is served"),
    "modalities": ((["text"],), 'set it to ["text"]'),
    "moderation": ((), "leave it out: nothing is moderated"),
    "prediction": ((), "leave it out"),
    "prompt_cache_options": ((), "leave it out: prompts are always cached; cache_salt keeps them apart"),
    "prompt_cache_retention": (("in_memory",), "leave it out: prompts are cached as long as there is room"),
    "request_id": ((), "send it as the header X-Request-Id"),
    "return_token_ids": ((False,), "leave it out, or ask for logprobs"),
    "return_tokens_as_token_ids": ((False,), "leave it out: tokens are texts"),
    "skip_special_tokens": ((True,), "set it to true: special tokens are no text"),
    "spaces_between_special_tokens": ((True,), "leave it out"),
    "store": ((False,), "set it to false: nothing is stored"),
    "suffix": (("",), "leave it out: text is generated only at the end"),
    "truncate_prompt_tokens": ((), "shorten the prompt"),
    "use_beam_search": ((False,), "set n"),
    "verbosity": (("medium",), "leave it out, or ask for it in the prompt"),
    "vllm_xargs": (({},), "leave it out"),
    "web_search_options": ((), "leave it out: the model searches nothing"),
}

IN_CHATS: NotDone = {"echo": ((False,), "put the last message in front of the answer yourself")}

IN_TOKENIZE: NotDone = {name: IN_BODIES[name] for name in ("chat_template", "mm_processor_kwargs")}

IN_STREAM_OPTIONS: NotDone = {
    "include_obfuscation": ((False,), "set it to false: nothing is added to the stream"),
    "continuous_usage_stats": ((False,), "leave it out: include_usage gives the usage at the end"),
}

IN_STRUCTURED_OUTPUTS: NotDone = {
    "structural_tag": ((), "use grammar"),
    "whitespace_pattern": ((), "leave it out: JSON has at most one blank after a comma or a colon"),
    "disable_fallback": ((True, False), "leave it out: there is one backend"),
    "disable_any_whitespace": ((True, False), "leave it out: JSON has at most one blank after a comma or a colon"),
    "disable_additional_properties": ((False,), "put additionalProperties into the schema"),
}

IN_TOOLS: NotDone = {
    "custom": ((), "describe a tool of type 'function'"),
}

# A message, and the parts of its content.
IN_MESSAGES: NotDone = {
    "refusal": ((), "put it into content"),
    "annotations": (([],), "leave it out"),
    "audio": ((), "leave it out: only text is supported"),
    "function_call": ((), "use tool_calls"),
    "prompt_cache_breakpoint": ((), "leave it out: every page of a prompt is cached"),
}


def refuse(struct: msgspec.Struct, not_done: NotDone, inside: str = "") -> None:
    """Raises InvalidRequestError if a field of `struct` holds what `not_done` doesn't let pass."""
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if value is None or name not in not_done:
            continue
        off, advice = not_done[name]
        # True is not 1 here.
        if not any(type(value) is type(passing) and value == passing for passing in off):
            raise InvalidRequestError(
                f"{inside}{name} is {shown(value)}, which is not supported: {advice}", field=inside + name
            )


def shown(value: Any) -> str:
    """A client's value in a message to it."""
    try:
        text = msgspec.json.encode(value).decode()
    except RecursionError:
        return "nested too deeply"
    return text if len(text) <= 40 else f"{text[:40]}…"
