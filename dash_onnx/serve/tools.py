"""Tools: how a model is told of them, and how its calls are found in what it writes.

Calls are written as Hermes, Qwen and SmolLM do, `<tool_call>{"name": ..., "arguments": ...}
</tool_call>`, or as Llama 3 does, an object alone. A model whose chat template knows no tools is
told of them in the system message.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from dash_onnx.core.errors import PolicyError
from dash_onnx.core.text import TextCodec, checked_messages
from dash_onnx.runtime.grammar import Grammar

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_ANSWER = "<tool_response>\n{}\n</tool_response>"
_TOLD = """\
You may call functions. Their signatures, as JSON, one a line:
<tools>
{}
</tools>
To call one, answer with its name and arguments as JSON within tags:
<tool_call>
{{"name": <function-name>, "arguments": <arguments-object>}}
</tool_call>"""


def checked_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """The tools of a request.

    Raises:
        PolicyError: one is no function with a name.
    """
    found = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise PolicyError("a tool must be {type: function, function: {name, parameters}}")
        found.append({"type": "function", "function": dict(function)})
    return found


def with_tools(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]], template: str | None
) -> list[dict[str, Any]]:
    """Messages as a template takes them: arguments as objects, and tools told where it cannot."""
    messages = [_with_objects(dict(message)) for message in checked_messages(messages)]
    if template is not None and "tools" in template:
        return messages
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    told = _TOLD.format("\n".join(json.dumps(tool) for tool in tools))
    if plain and plain[0]["role"] == "system":
        first = {**plain[0], "content": f"{plain[0].get('content') or ''}\n\n{told}"}
        return [first, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def forced_call(tools: list[dict[str, Any]], choice: Any, codec: TextCodec) -> Grammar | None:
    """What an answer must be where the request asks for a call.

    Args:
        tools: of the request.
        choice: its `tool_choice`.
        codec: of the model: where it has tokens for the tags, those are meant.

    Raises:
        PolicyError: it names no tool, or a tool's parameters are no schema.
    """
    if choice in (None, "auto", "none"):
        return None
    allowed = [tool["function"] for tool in tools]
    if choice != "required":
        function = choice.get("function") if isinstance(choice, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        allowed = [function for function in allowed if function["name"] == name]
    if not allowed:
        raise PolicyError(f"tool_choice {str(choice)[:100]!r} names none of the tools")
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": function.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in allowed
    ]
    schema = {"anyOf": calls, "x-guidance": {"whitespace_flexible": False}}
    first, last = (
        f'"{tag}"' if (token := codec.tokenizer.token_to_id(tag)) is None else f"<[{token}]>"
        for tag in (OPEN, CLOSE)
    )
    form = f'start: {first} "\\n" call "\\n" {last}'
    return Grammar.lark(f"{form}\ncall: %json {json.dumps(schema)}\n")


class CallReader:
    """Divides the text of an answer, as it comes, into what is said and what is called."""

    def __init__(self, tools: list[dict[str, Any]]):
        """Begins; without tools all is said."""
        self._names = {tool["function"]["name"] for tool in tools}
        self._held, self._spoke = "", False

    def add(self, text: str) -> str:
        """What is said for sure; the rest may be a call."""
        if not self._names:
            return text
        self._held += text
        if not self._spoke and self._held.lstrip().startswith("{"):
            return ""
        at = self._held.find(OPEN)
        if at < 0:  # perhaps it begins at the end
            lengths = range(min(len(OPEN) - 1, len(self._held)), 0, -1)
            at = len(self._held) - next(
                (size for size in lengths if self._held.endswith(OPEN[:size])), 0
            )
        said, self._held = self._held[:at], self._held[at:]
        self._spoke = self._spoke or bool(said.strip())
        return said

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """What else is said at the end, and the calls in OpenAI's form."""
        said, calls, rest = "", [], self._held
        self._held = ""
        while rest:
            at = rest.find("{")
            call, end = self._call(rest, at) if at >= 0 else (None, 0)
            if call is None:
                size = at + 1 or len(rest)
                said, rest = said + rest[:size], rest[size:]
                continue
            # Tags that are special tokens are no text: calls may stand there without.
            said += rest[:at].rstrip().removesuffix(OPEN)
            calls.append(call)
            rest = rest[end:].lstrip().removeprefix(CLOSE).lstrip()
        return said, calls

    def _call(self, text: str, start: int) -> tuple[dict[str, Any] | None, int]:
        """The call that begins there, if one does, and where it ends."""
        try:
            call, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            return None, 0
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None, 0
        arguments = call.get("arguments", call.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments)
        whole = arguments.encode("utf-8", "replace").decode()  # a lone surrogate cannot be sent
        function = {"name": name, "arguments": whole}
        number = f"call_{uuid.uuid4().hex[:24]}"
        return {"id": number, "type": "function", "function": function}, end


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have objects as arguments, where OpenAI's have JSON."""
    if not isinstance(message.get("tool_calls"), list):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise PolicyError("a tool call must be {type: function, function: {name, arguments}}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise PolicyError("the arguments of a tool call are not JSON") from None
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message in the words of `_TOLD`, for a template that knows neither calls nor results."""
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": _ANSWER.format(content)}
    if not message.get("tool_calls"):
        return message
    calls = "\n".join(
        f"{OPEN}\n{json.dumps(call['function'])}\n{CLOSE}" for call in message["tool_calls"]
    )
    return {"role": "assistant", "content": f"{content}\n{calls}".strip()}
