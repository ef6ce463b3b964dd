"""Tools: how they are described to a model, and the grammar of an answer that calls one.

If a chat template does not support tools, or has the model call them in a form that is not read,
they are described in the system message.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from dash_onnx.core.conversation import checked_messages, rendered
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.text import TextCodec
from dash_onnx.runtime.grammar import Grammar, closed_schema, with_options
from dash_onnx.serve.calls import FORMS, HERMES, CallReader, Form

_IN_MESSAGE = "message['tools']"  # Phi 4 reads them from the system message
_TAG_BEGUN = re.compile(r"[<\[][^>\]]*$")  # at the end of a text
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


class Support(NamedTuple):
    """What a chat template does with tools.

    Attributes:
        tools: whether it describes them, and has the model call them in a form that is read.
        calls: whether it writes the calls of earlier answers.
    """

    tools: bool
    calls: bool


@functools.lru_cache
def support_of(template: str | None, special: tuple[tuple[str, str], ...] = ()) -> Support:
    """Tries out what a template does with tools.

    Args:
        template: its source, if there is one.
        special: the model's special tokens by their names.
    """
    called, described = "call_of_before", "described_tool"
    asked = {"role": "user", "content": "."}
    function = {"name": called, "arguments": {"a": 1}}
    call = {"id": "a1b2c3d4e", "type": "function", "function": function}
    before = {"role": "assistant", "content": "", "tool_calls": [call]}
    answer = {"role": "tool", "name": called, "tool_call_id": call["id"], "content": "."}
    values = {"a": {"type": "integer", "description": "."}}
    parameters = {"type": "object", "properties": values, "required": ["a"]}
    tool = {"name": described, "description": ".", "parameters": parameters}

    def text(*messages: dict[str, Any]) -> str:
        values = {"tools": [{"type": "function", "function": tool}], "add_generation_prompt": True}
        try:
            return rendered(template or "", messages, values, dict(special))
        except PolicyError:
            return ""

    start, history = text(asked), text(asked, before, answer)
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(start, history, strict=False))
    shared = _TAG_BEGUN.sub("", "".join(letter for letter, _ in equal))
    reader = CallReader([{"function": {"name": called}}])
    reader.add(history[len(shared) :])  # what the model would write
    _, found = reader.finish()
    written, form = called in history, _form(template)
    known = bool(found) if written else form is not HERMES or HERMES.open in (template or "")
    return Support(described in start and known, written)


def checked_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """The tools of a request.

    Raises:
        PolicyError: a tool is not a function with a name, or its parameters are not a schema.
    """
    found = []
    for tool in tools:
        function = _function_of(tool)
        if not isinstance(function.get("name"), str):
            raise PolicyError("a tool must be {type: function, function: {name, parameters}}")
        if not isinstance(function.get("parameters") or {}, Mapping):
            raise PolicyError("the parameters of a tool must be a JSON schema, an object")
        found.append({"type": "function", "function": dict(function)})
    return found


def type_of(tool: Any) -> str:
    """The type of a tool or of a choice, a function unless it says otherwise."""
    return str(tool.get("type") or "function") if isinstance(tool, Mapping) else "function"


def _function_of(tool: Any) -> Mapping[str, Any]:
    """The function of a tool or of a choice; the fields of its own, as in /v1/responses."""
    if not isinstance(tool, Mapping) or type_of(tool) != "function":
        return {}
    function = tool.get("function", {k: v for k, v in tool.items() if k != "type"})
    return function if isinstance(function, Mapping) else {}


def allowed_tools(tools: list[dict[str, Any]], choice: Any) -> tuple[list[dict[str, Any]], Any]:
    """The tools that a choice of type `allowed_tools` leaves, and the choice among them.

    Raises:
        PolicyError: it has no mode, or no tool that was sent.
    """
    if not isinstance(choice, Mapping) or choice.get("type") != "allowed_tools":
        return tools, choice
    given = choice.get("allowed_tools", choice)  # in /v1/responses, the fields are its own
    if not isinstance(given, Mapping) or not isinstance(given.get("tools"), list):
        raise PolicyError("tool_choice: allowed_tools needs a list of tools")
    names, mode = [_function_of(tool).get("name") for tool in given["tools"]], given.get("mode")
    found = [tool for tool in tools if tool["function"]["name"] in names]
    if mode not in ("auto", "required") or not found:
        told = "a mode, auto or required, and tools that were sent"
        raise PolicyError(f"tool_choice: allowed_tools needs {told}")
    return found, mode


def decoded(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with the arguments of their calls as objects, and text beside them, if empty.

    Raises:
        PolicyError: they are not valid.
    """
    return [
        _with_objects({**message, "content": message.get("content") or ""})
        for message in checked_messages(messages)
    ]


def with_tools(
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    template: str | None,
    support: Support,
) -> list[dict[str, Any]]:
    """Messages from `decoded` for a template: with tools and calls described as it needs them."""
    form = _form(template)
    if template is not None and _IN_MESSAGE in template:
        messages = [_with_calls(message, form) for message in messages]
        functions = [tool["function"] for tool in tools]
        return _with_system(messages, "", tools=_json(functions)) if tools else messages
    if support.tools:
        return messages if support.calls else [_with_calls(one, form) for one in messages]
    plain = list[dict[str, Any]]()
    answered = False  # by a tool: what follows is the same turn, as some templates ask for turns
    for message in messages:
        one, role = _plain(message), message["role"]
        if answered and role in ("tool", "user"):
            content = f"{plain[-1]['content']}\n{one['content']}"
            plain[-1] = {**plain[-1], "content": content}
        else:
            plain.append(one)
        answered = role == "tool"
    return _with_system(plain, _TOLD.format("\n".join(map(_json, tools)))) if tools else plain


def _with_system(messages: list[dict[str, Any]], told: str, **more: Any) -> list[dict[str, Any]]:
    """Messages with text added to the system message at their start."""
    first, rest = {"role": "system", "content": ""}, messages
    if messages and messages[0]["role"] == "system":
        first, *rest = messages
    content = f"{first['content']}\n\n{told}".strip()
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
        name = _function_of(choice).get("name")
        allowed = [function for function in allowed if function["name"] == name]
    if not allowed:
        known = "no tools were sent" if not tools else "none of the tools has that name"
        raise PolicyError(f"tool_choice: {str(choice)[:100]!r} needs a tool, and {known}")
    start, rules = _call_rules(allowed, codec)
    return Grammar.lark(f"start: {start}\n{rules}")


def call_or_answer(tools: list[dict[str, Any]], schema: Any, codec: TextCodec) -> Grammar:
    """The grammar of an answer that is a call, or JSON that matches a schema.

    Args:
        tools: tools of the request.
        schema: JSON schema of an answer without a call.
        codec: see `forced_call`.

    Raises:
        PolicyError: a schema is not valid.
    """
    start, rules = _call_rules([tool["function"] for tool in tools], codec)
    answer = json.dumps(with_options(schema))
    return Grammar.lark(f"start: {start} | answer\n{rules}answer: %json {answer}\n")


def _call_rules(functions: list[dict[str, Any]], codec: TextCodec) -> tuple[str, str]:
    """How a call to one of some functions begins and ends, in Lark, and the rules for it.

    Args:
        functions: their names and parameters.
        codec: see `forced_call`.
    """
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
        for number, function in enumerate(functions)
    ]
    form, token = _form(codec.chat_template), codec.tokenizer.token_to_id
    form = HERMES if form.python else form  # whose grammar is not written here
    schema: dict[str, Any] = {"anyOf": calls}
    if form.listed:
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
    first, last = (
        json.dumps(tag) if token(tag) is None else f"<[{token(tag)}]>"
        for tag in (form.open, form.close)
    )
    if form.listed:
        last = "" if token(form.close) is None else last
    else:
        first, last = f'{first} "\\n"', f'"\\n" {last}'
    return f"{first} call {last}", f"call: %json {json.dumps(with_options(schema))}\n"


def _document(name: str, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The schema of arguments as a document of its own, to which its `$ref` are relative."""
    # In older drafts, a `$ref` hides the `$id` next to it.
    draft = "https://json-schema.org/draft/2020-12/schema"
    schema = closed_schema(parameters or {"type": "object", "properties": {}})
    return {**schema, "$schema": draft, "$id": name}


def _form(template: str | None) -> Form:
    """How a model with this chat template writes calls."""
    found = (f for f in FORMS if any(mark in (template or "") for mark in f.marks))
    return next(found, HERMES)


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the arguments of calls as objects, which OpenAI's API has as JSON strings."""
    given = message.get("tool_calls")
    if given is None:
        return message
    calls, listed = [], given if isinstance(given, list) else [{}]
    for call in listed:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise PolicyError("a tool call must be {type: function, function: {name, arguments}}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):  # as a model may have written it
                arguments = json.loads(arguments or "{}")
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _with_calls(message: dict[str, Any], form: Form) -> dict[str, Any]:
    """A message with its calls in its text, for templates that leave them out."""
    rest = dict(message)
    functions = [call["function"] for call in rest.pop("tool_calls", None) or ()]
    if not functions:
        return message
    if form.python:
        calls = f"{form.open}[{', '.join(map(_in_python, functions))}]{form.close}"
    elif form.listed:
        calls = f"{form.open}{_json(functions)}{form.close}"
    else:
        calls = "\n".join(f"{form.open}\n{_json(one)}\n{form.close}" for one in functions)
    space = "" if form.listed or not rest["content"] else "\n"
    return {**rest, "content": f"{rest['content']}{space}{calls}"}


def _in_python(function: dict[str, Any]) -> str:
    given = function["arguments"] if isinstance(function["arguments"], Mapping) else {}
    return f"{function['name']}({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def _json(data: Any) -> str:
    """JSON for a model: other letters as they are."""
    return json.dumps(data, ensure_ascii=False)


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message in the format of `_TOLD`, for a template without support for calls and results."""
    if message["role"] == "tool":
        return {"role": "user", "content": _ANSWER.format(message["content"])}
    return _with_calls(message, HERMES)
