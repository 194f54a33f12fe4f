"""The tools of a request and whether the model may, must or must not call one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from quire.service.chat import ChatTemplate

# A model that must call something and may call several things would not always stop by itself.
MAX_PARALLEL_CALLS = 16


class ToolFormat(Enum):
    """How a model writes a call; the values are those of the flag --tool-call-format."""

    # <tool_call>{"name": …, "arguments": {…}}</tool_call>, as Hermes and Qwen do.
    HERMES = "hermes"
    # {"name": …, "parameters": {…}}, as Llama 3 does.
    LLAMA3_JSON = "llama3_json"

    @classmethod
    def of(cls, template: ChatTemplate) -> ToolFormat:
        """The format that a chat template teaches; Hermes' if it teaches none."""
        source = template.source
        if "<tool_call>" not in source and ('"parameters":' in source or "<|python_tag|>" in source):
            return cls.LLAMA3_JSON
        return cls.HERMES


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON Schema of its arguments, None for any object.

    `strict`: the arguments match the schema whatever the model would like to write.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    @property
    def definition(self) -> dict[str, Any]:
        """OpenAI's object, as chat templates want it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        function["parameters"] = dict(self.parameters) if self.parameters is not None else {"type": "object"}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """The tools that may be called (empty: none), whether one must be, and whether it may be more than one."""

    tools: tuple[Tool, ...] = ()
    required: bool = False
    parallel: bool = True

    @property
    def enforced(self) -> bool:
        """Whether the output has to be held to a grammar."""
        return self.required or not self.parallel or any(tool.strict for tool in self.tools)

    @property
    def max_calls(self) -> int:
        """Calls in one output, where a grammar holds it."""
        return MAX_PARALLEL_CALLS if self.parallel else 1
