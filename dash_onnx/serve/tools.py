"""Tools: how they are described to a model, and how its calls are found in its output.

A call is `{"name": ..., "arguments": ...}`. Families write it alone or in a list, with their
own tags around it, see `_FORMS`, or without any, as Llama 3 does. If a chat template does not
support tools, they are described in the system message.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dash_onnx.core.errors import PolicyError
from dash_onnx.core.text import TextCodec, checked_messages
from dash_onnx.runtime.grammar import Grammar
from dash_onnx.runtime.writer import begins


class _Form(NamedTuple):
    """How a family writes calls.

    Attributes:
        marks: any of them in a chat template identifies the family.
        open: tag before the calls.
        close: tag after them; not written if the vocabulary lacks it.
        listed: whether they are in a list.
    """

    marks: tuple[str, ...]
    open: str
    close: str
    listed: bool = True


_HERMES = _Form((), "<tool_call>", "</tool_call>", listed=False)  # Qwen, SmolLM, Granite 4
_FORMS = (
    _Form(("[TOOL_CALLS]",), "[TOOL_CALLS]", ""),  # Mistral
    _Form(("<|tool_call|>", "<|tool|>"), "<|tool_call|>", "<|/tool_call|>"),  # Granite 3, Phi 4
)
_OPENS = tuple(form.open for form in (_HERMES, *_FORMS))
# What may follow a call. Tags that are special tokens do not appear in the text.
_AFTER = re.compile(r"\s*[],]?\s*(?:</tool_call>|<\|/tool_call\|>)?\s*")
_BARE = re.compile(r"\s*\[?\s*(?:$|\{)")  # an answer that may consist only of calls
_IN_MESSAGE = "message['tools']"  # Phi 4 reads them from the system message
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
        PolicyError: a tool is not a function with a name.
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
    """Messages for a template: arguments as objects, and tools described if it cannot do so."""
    messages = [_with_objects(dict(message)) for message in checked_messages(messages)]
    if tools and template is not None and _IN_MESSAGE in template:
        return _with_system(messages, "", tools=json.dumps([tool["function"] for tool in tools]))
    if template is not None and "tools" in template:
        return messages
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    return _with_system(plain, _TOLD.format("\n".join(json.dumps(tool) for tool in tools)))


def _with_system(messages: list[dict[str, Any]], told: str, **more: Any) -> list[dict[str, Any]]:
    """Messages with text added to the system message at their start."""
    first, rest = {"role": "system", "content": ""}, messages
    if messages and messages[0]["role"] == "system":
        first, *rest = messages
    content = f"{first.get('content') or ''}\n\n{told}".strip()
    return [{**first, "content": content, **more}, *rest]


def forced_call(tools: list[dict[str, Any]], choice: Any, codec: TextCodec) -> Grammar | None:
    """The grammar of an answer if the request requires a call.

    Args:
        tools: tools of the request.
        choice: its `tool_choice`.
        codec: codec of the model: if it has tokens for the tags, the grammar uses those.

    Raises:
        PolicyError: it does not name a tool, or a tool's parameters are not a schema.
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
    form, token = _form(codec.chat_template), codec.tokenizer.token_to_id
    schema: dict[str, Any] = {"anyOf": calls}
    if form.listed:
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
    schema["x-guidance"] = {"whitespace_flexible": False}
    first, last = (
        json.dumps(tag) if token(tag) is None else f"<[{token(tag)}]>"
        for tag in (form.open, form.close)
    )
    if form.listed:
        last = "" if token(form.close) is None else last
    else:
        first, last = f'{first} "\\n"', f'"\\n" {last}'
    return Grammar.lark(f"start: {first} call {last}\ncall: %json {json.dumps(schema)}\n")


def _form(template: str | None) -> _Form:
    """How a model with this chat template writes calls."""
    found = (f for f in _FORMS if any(mark in (template or "") for mark in f.marks))
    return next(found, _HERMES)


class CallReader:
    """Splits the text of an answer, as it arrives, into content and calls."""

    def __init__(self, tools: list[dict[str, Any]]):
        """Starts; without tools, all text is content."""
        self._names = {tool["function"]["name"] for tool in tools}
        self._held, self._spoke = "", False

    def add(self, text: str) -> str:
        """Adds text; returns the part that is certainly content, as the rest may be a call."""
        if not self._names:
            return text
        self._held += text
        if not self._spoke and self._held.strip() and _BARE.match(self._held):
            return ""
        at = min(begins(self._held, tag) for tag in _OPENS)
        said, self._held = self._held[:at], self._held[at:]
        self._spoke = self._spoke or bool(said.strip())
        return said

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """The remaining content at the end, and the calls in OpenAI's form."""
        said, calls, rest = "", [], self._held
        self._held = ""
        while rest:
            at = rest.find("{")
            call, end = self._call(rest, at) if at >= 0 else (None, 0)
            if call is None:
                size = at + 1 or len(rest)
                said, rest = said + rest[:size], rest[size:]
                continue
            said += _without_tag(rest[:at])
            calls.append(call)
            rest = rest[end:]
            rest = rest[_AFTER.match(rest).end() :]  # type: ignore[union-attr]
        return said, calls

    def _call(self, text: str, start: int) -> tuple[dict[str, Any] | None, int]:
        """The call that begins at this position, if any, and where it ends."""
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
        whole = arguments.encode("utf-8", "replace").decode()  # lone surrogates cannot be sent
        function = {"name": name, "arguments": whole}
        number = uuid.uuid4().hex[:9]  # the only length that Mistral's templates accept
        return {"id": number, "type": "function", "function": function}, end


def _without_tag(text: str) -> str:
    """The text before a call, without the tag or bracket that belongs to the call."""
    text = text.rstrip().removesuffix("[").rstrip()
    for tag in _OPENS:
        text = text.removesuffix(tag)
    return text.rstrip()


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the arguments of calls as objects, which OpenAI's API has as JSON strings."""
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
    """A message in the format of `_TOLD`, for a template without support for calls and results."""
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": _ANSWER.format(content)}
    if not message.get("tool_calls"):
        return message
    calls = "\n".join(
        f"{_HERMES.open}\n{json.dumps(call['function'])}\n{_HERMES.close}"
        for call in message["tool_calls"]
    )
    return {"role": "assistant", "content": f"{content}\n{calls}".strip()}
