"""Tools: how they are described to a model, and how its calls are found in its output.

A call is `{"name": ..., "arguments": ...}`. Families write it alone or in a list, with their own
tags around it, see `_FORMS`, or without any, as Llama 3 does. Qwen3-Coder and Qwen3.5 write its
parts as tags instead of JSON, and later models of Mistral only its arguments as JSON. If a chat
template does not support tools, they are described in the system message.
"""

from __future__ import annotations

import functools
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dash_onnx.core.conversation import checked_messages
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.text import TextCodec
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
_FUNCTION = "<function="  # where Qwen3-Coder's calls begin if it forgets the tag before them
# Mistral's later models write the name of a function before its arguments.
_NAMED = r"([\w-]{1,64})(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?(?=\{)"
_CALL = re.compile(rf"{_NAMED}|\{{|{_FUNCTION}")
_NAME = re.compile(_FUNCTION + r"([^>\n]+)>\s*")
_PARAMETER = re.compile(
    r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*(?=<parameter=|</function>)", re.DOTALL
)
_END = "</function>"
_PYTHON = {"True": True, "False": False, "None": None}  # as Qwen's templates write them
_KINDS = {
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"number"},
    dict: {"object"},
    list: {"array"},
    type(None): {"null"},
}
_UNTYPED = {"string", "object", "array"}  # what a parameter may be if its schema names no type
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
        PolicyError: a tool is not a function with a name, or its parameters are not a schema.
    """
    found = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise PolicyError("a tool must be {type: function, function: {name, parameters}}")
        if not isinstance(function.get("parameters") or {}, Mapping):
            raise PolicyError("the parameters of a tool must be a JSON schema, an object")
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
                "arguments": _document(f"tool:///{number}", function.get("parameters")),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for number, function in enumerate(allowed)
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


def _document(name: str, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The schema of arguments as a document of its own, to which its `$ref` are relative."""
    # In older drafts, a `$ref` hides the `$id` next to it.
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {**(parameters or {"type": "object"}), "$schema": draft, "$id": name}


def open_tokens(codec: TextCodec) -> frozenset[int]:
    """Ids of tokens that are a tag before calls; as special tokens they do not appear in text."""
    found = map(codec.tokenizer.token_to_id, _OPENS)
    return frozenset(token for token in found if token is not None)


def _form(template: str | None) -> _Form:
    """How a model with this chat template writes calls."""
    found = (f for f in _FORMS if any(mark in (template or "") for mark in f.marks))
    return next(found, _HERMES)


class CallReader:
    """Splits the text of an answer, as it arrives, into content and calls."""

    def __init__(self, tools: list[dict[str, Any]]):
        """Starts; without tools, all text is content."""
        functions = [tool["function"] for tool in tools]
        self._schemas = {one["name"]: one.get("parameters") or {} for one in functions}
        self._held, self._spoke, self._opened = "", False, False

    def add(self, text: str, *, opens: bool = False) -> str:
        """Adds text; returns the part that is certainly content, as the rest may be a call.

        Args:
            text: text of the answer.
            opens: whether its token is one of `open_tokens`.
        """
        if not self._schemas:
            return text
        self._held += text
        self._opened = self._opened or opens
        if self._opened:
            return ""
        if not self._spoke and self._held.strip() and _BARE.match(self._held):
            return ""
        at = min(begins(self._held, tag) for tag in (*_OPENS, _FUNCTION))
        said, self._held = self._held[:at], self._held[at:]
        self._spoke = self._spoke or bool(said.strip())
        return said

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """The remaining content at the end, and the calls in OpenAI's form."""
        said, calls, rest = "", [], self._held
        self._held = ""
        while rest:
            found = _CALL.search(rest)
            at = found.start() if found else len(rest)
            call, end = self._call(found) if found else (None, 0)
            if call is None:
                said, rest = said + rest[: at + 1], rest[at + 1 :]
                continue
            said += _without_tag(rest[:at])
            calls.append(call)
            rest = rest[end:]
            rest = rest[_AFTER.match(rest).end() :]  # type: ignore[union-attr]
        return said, calls

    def _call(self, found: re.Match[str]) -> tuple[dict[str, Any] | None, int]:
        """The call that begins at a match of `_CALL`, if any, and where it ends."""
        text, start = found.string, found.start()
        if found[1]:
            written = _in_json(text, found.end(), found[1])
        else:
            written = _in_json(text, start) if text[start] == "{" else self._in_tags(text, start)
        if written is None or written[0] not in self._schemas:
            return None, 0
        name, arguments, end = written
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments)
        whole = arguments.encode("utf-8", "replace").decode()  # lone surrogates cannot be sent
        function = {"name": name, "arguments": whole}
        number = uuid.uuid4().hex[:9]  # the only length that Mistral's templates accept
        return {"id": number, "type": "function", "function": function}, end

    def _in_tags(self, text: str, start: int) -> tuple[str, Any, int] | None:
        """Name and arguments of a call in tags, and where it ends."""
        name = _NAME.match(text, start)
        if name is None or name[1] not in self._schemas:
            return None
        document, arguments, end = self._schemas[name[1]], {}, name.end()
        schema = _part(document, str(document.get("$ref", "#")))
        while found := _PARAMETER.match(text, end):
            kinds = _kinds(_member(_member(schema, "properties"), found[1]), document)
            arguments[found[1]] = _value(found[2], kinds)
            end = found.end()
        return (name[1], arguments, end + len(_END)) if text.startswith(_END, end) else None


def _in_json(text: str, start: int, known: str = "") -> tuple[str, Any, int] | None:
    """Name and arguments of a call in JSON, which are all of it if its name is known."""
    try:
        call, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    if known:
        return known, call, end
    name = call.get("name")
    if not isinstance(name, str):
        return None
    return name, call.get("arguments", call.get("parameters", {})), end


def _value(text: str, kinds: set[str]) -> Any:
    """A parameter's value of one of these types: a string as it is, all else from JSON."""
    if kinds == {"string"}:
        return text
    try:
        value = json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        value = _PYTHON.get(text, text)
    fits = "string" not in kinds or kinds & _KINDS.get(type(value), set())
    return value if fits else text


def _kinds(schema: Any, document: Mapping[str, Any]) -> set[str]:
    """The types that a schema, a part of a document, allows."""
    kinds, left, followed = set[str](), [schema], set[str]()
    while left:
        one = left.pop()
        if isinstance(one, str):
            kinds.add(one)
        elif isinstance(one, list):
            left += one
        elif isinstance(one, Mapping):
            if "$ref" in one:
                ref = str(one["$ref"])
                left.append(None if ref in followed else _part(document, ref))
                followed.add(ref)
            else:
                parts = (one[key] for key in ("type", "anyOf", "oneOf", "allOf") if one.get(key))
                left.append(next(parts, [*_UNTYPED]))
    return kinds or _UNTYPED


def _part(document: Any, ref: str) -> Any:
    """The part of a document to which a `$ref` points; None if there is none."""
    return functools.reduce(_member, ref.split("/")[1:], document)


def _member(data: Any, name: str) -> Any:
    return data.get(name) if isinstance(data, Mapping) else None


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
