"""Bodies with one thing wrong, each with the name of the field that the error has to give.

A case on top of CHAT, TEXT, TOKENIZE or DETOKENIZE is the whole body.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway_testing import MODEL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": MODEL, "prompt": "hi"}
TOKENIZE = {"prompt": "hi"}
DETOKENIZE = {"tokens": [5]}
SCHEMA = {"name": "x", "schema": {"type": "object"}}


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}, {"role": "user", "content": "hi"} | fields]}


def tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "now"} | fields}]}


def called(**fields: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}} | fields
    return message(role="assistant", content=None, tool_calls=[call])


NOW = tool()
DEEP: dict[str, Any] = {}
for _ in range(900):
    DEEP = {"a": DEEP}

BAD_COMMON: list[tuple[Mapping[str, Any], str]] = [
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
    ({"max_token": 5}, "max_token"),
    ({"Temperature": 1}, "Temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 100_000}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"min_tokens": 100_000}, "min_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 1e300}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_p": 1e-60}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": 1.1}, "min_p"),
    ({"seed": 2**64}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 10**400}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"frequency_penalty": "much"}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 5e-324}, "repetition_penalty"),
    ({"repetition_penalty": 101}, "repetition_penalty"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"five": 1}}, "logit_bias"),
    ({"logit_bias": {"-5": 1}}, "logit_bias"),
    ({"logit_bias": {"49152": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 400: 1}}, "logit_bias"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": 1}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [49152]}, "stop_token_ids"),
    ({"stop_token_ids": list(range(129))}, "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
    ({"bad_words": [""]}, "bad_words"),
    ({"bad_words": "word"}, "bad_words"),
    ({"bad_words": ["a"] * 257}, "bad_words"),
    ({"bad_words": ["a b c d " * 20]}, "bad_words"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"ignore_eos": True, "regex": "a"}, "ignore_eos"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"priority": 2**31}, "priority"),
    ({"priority": "high"}, "priority"),
    ({"cache_salt": 1}, "cache_salt"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": True}, "n"),
    ({"n": 10**12}, "n"),
    ({"regex": ""}, "regex"),
    ({"grammar": ""}, "grammar"),
    ({"regex": "a", "grammar": "b"}, "grammar"),
    ({"regex": "a", "response_format": {"type": "json_object"}}, "regex"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "text", "json_schema": SCHEMA}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": SCHEMA | {"name": "a b"}}},
        "response_format.json_schema.name",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": SCHEMA | {"schema": []}}},
        "response_format.json_schema.schema",
    ),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
    ({"structured_outputs": {"structural_tag": "{}", "regex": "a"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"schema": {}}}, "structured_outputs.schema"),
    ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "guided_regex"),
    ({"guided_json": "not json"}, "guided_json"),
    ({"guided_json": []}, "guided_json"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_grammar": ""}, "guided_grammar"),
    ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend"),
    ({"metadata": {"a": 1}}, "metadata[...]"),
    ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"allowed_token_ids": [1]}, "allowed_token_ids"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"length_penalty": 2}, "length_penalty"),
    ({"request_id": "mine"}, "request_id"),
    ({"vllm_xargs": DEEP}, "vllm_xargs"),
]

BAD_CHATS: list[tuple[Mapping[str, Any], str]] = [
    *BAD_COMMON,
    ({"messages": "hi"}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": {}}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    (message(role="wizard"), "messages[1].role"),
    (message(role="function"), "messages[1].role"),
    (message(role=""), "messages[1].role"),
    (message(role=None), "messages[1].role"),
    (message(role="tool"), "messages[1].tool_call_id"),
    (message(tool_call_id="c1"), "messages[1].tool_call_id"),
    (message(reasoning_content="hm"), "messages[1].reasoning_content"),
    (message(content=None), "messages[1].content"),
    (message(content=7), "messages[1].content"),
    (message(role="assistant", content=None), "messages[1].content"),
    (message(role="assistant", content=None, tool_calls=[]), "messages[1].content"),
    (message(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "messages[1].content[0].type"),
    (message(content=[{"type": "text", "text": "a"}, {"type": "text"}]), "messages[1].content[1].text"),
    (message(content=[{"type": "text", "text": "a", "image_url": "x"}]), "messages[1].content[0].image_url"),
    (message(content=[{"text": "a"}]), "messages[1].content[0].type"),
    (message(content=[{"type": "text", "text": 1}]), "messages[1].content[0].text"),
    (message(name=5), "messages[1].name"),
    (message(tool_calls=[{"id": "1", "function": {"name": "f", "arguments": "{}"}}]), "messages[1].tool_calls"),
    (message(colour="red"), "messages[1].colour"),
    (called(id=None), "messages[1].tool_calls[0].id"),
    (called(type="custom"), "messages[1].tool_calls[0].type"),
    (called(function={"name": "now"}), "messages[1].tool_calls[0].function.arguments"),
    (called(function={"name": "now", "arguments": {}}), "messages[1].tool_calls[0].function.arguments"),
    (called(function={"name": "now", "arguments": "{"}), "messages[1].tool_calls[0].function.arguments"),
    (called(function={"name": "now", "arguments": "[]"}), "messages[1].tool_calls[0].function.arguments"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
    ({"max_completion_tokens": 100_000}, "max_completion_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"tools": {}}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"function": {"name": "now"}}]}, "tools[0].type"),
    ({"tools": [*NOW["tools"], *NOW["tools"]]}, "tools[1].function.name"),
    ({"tools": NOW["tools"] * 129}, "tools"),
    (tool(name=""), "tools[0].function.name"),
    (tool(name="a b"), "tools[0].function.name"),
    (tool(name="a" * 65), "tools[0].function.name"),
    (tool(parameters="{}"), "tools[0].function.parameters"),
    (tool(parameters={"type": "string"}), "tools[0].function.parameters.type"),
    (tool(colour="red"), "tools[0].function.colour"),
    ({"tool_choice": "required"}, "tool_choice"),
    (NOW | {"tool_choice": "some"}, "tool_choice"),
    (NOW | {"tool_choice": {"type": "function"}}, "tool_choice.function.name"),
    (NOW | {"tool_choice": {"type": "function", "function": {"name": "then"}}}, "tool_choice.function.name"),
    (NOW | {"tool_choice": {"type": "custom", "custom": {"name": "now"}}}, "tool_choice.custom"),
    (NOW | {"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
    (
        NOW
        | {
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "x"}}]},
            }
        },
        "tool_choice.allowed_tools.tools[0].function.name",
    ),
    (NOW | {"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    (NOW | {"parallel_tool_calls": False, "ignore_eos": True}, "ignore_eos"),
    ({"functions": [{}]}, "functions"),
    ({"function_call": {"name": "x"}}, "function_call"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"verbosity": "low"}, "verbosity"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"echo": True}, "echo"),
    ({"best_of": 2}, "best_of"),
    ({"prompt": "hi"}, "prompt"),
]

BAD_COMPLETIONS: list[tuple[Mapping[str, Any], str]] = [
    *BAD_COMMON,
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": [3, -1]}, "prompt[1]"),
    ({"prompt": [3, 5, 49152]}, "prompt[2]"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": ["a"] * 65, "n": 2}, "n"),
    ({"prompt": [5] * 8192}, "prompt"),
    ({"prompt": [5] * 8000, "max_tokens": 193}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"echo": 1}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"tools": []}, "tools"),
]

BAD_TOKENIZE: list[tuple[Mapping[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"messages": CHAT["messages"]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"tools": []}, "tools"),
    ({"add_generation_prompt": True}, "add_generation_prompt"),
    ({"prompt": None, "messages": []}, "messages"),
    ({"prompt": None, "messages": [{"role": "x", "content": ""}]}, "messages[0].role"),
    ({"return_token_strs": 1}, "return_token_strs"),
    ({"temperature": 1}, "temperature"),
]

BAD_DETOKENIZE: list[tuple[Mapping[str, Any], str]] = [
    ({"tokens": None}, "tokens"),
    ({"tokens": "x"}, "tokens"),
    ({"tokens": [-1]}, "tokens[0]"),
    ({"tokens": [5, 49152]}, "tokens[1]"),
    ({"prompt": "x"}, "prompt"),
]
