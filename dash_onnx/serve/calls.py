"""How calls of tools are found in a model's output.

A call is `{"name": ..., "arguments": ...}`. Families write it alone or in a list, with their own
tags around it, see `FORMS`, or without any, as Llama 3 does. Qwen3-Coder and Qwen3.5 write its
parts as tags instead of JSON, later models of Mistral only its arguments as JSON, and LFM2 a call
in Python.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import math
import re
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from dash_onnx.core.text import TextCodec
from dash_onnx.runtime.writer import begins


class Form(NamedTuple):
    """How a family writes calls.

    Attributes:
        marks: any of them in a chat template identifies the family.
        open: tag before the calls.
        close: tag after them; not written if the vocabulary lacks it.
        listed: whether they are in a list.
        python: whether they are written in Python.
    """

    marks: tuple[str, ...]
    open: str
    close: str
    listed: bool = True
    python: bool = False


HERMES = Form((), "<tool_call>", "</tool_call>", listed=False)  # Qwen, SmolLM, Granite 4
FORMS = (
    Form(("[TOOL_CALLS]",), "[TOOL_CALLS]", ""),  # Mistral
    Form(("<|tool|>",), "<|tool_call|>", "<|/tool_call|>"),  # Phi 4
    Form(("<|tool_call|>",), "<|tool_call|>", ""),  # Granite 3
    Form(("List of tools: ",), "<|tool_call_start|>", "<|tool_call_end|>", python=True),  # LFM2
)
_OPENS = tuple(dict.fromkeys(form.open for form in (HERMES, *FORMS)))
_FUNCTION = "<function="  # where Qwen3-Coder's calls begin if it forgets the tag before them
# Mistral's later models write the name of a function before its arguments.
_NAMED = r"([\w-]{1,64})(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?(?=\{)"
_CALL = re.compile(rf"{_NAMED}|\{{|{_FUNCTION}|([\w-]{{1,64}})\(")
_NAME = re.compile(_FUNCTION + r"([^>\n]+)>\s*")
_PARAMETER = re.compile(
    r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*(?=<parameter=|</function>)", re.DOTALL
)
_END = "</function>"
_PYTHON = {"True": True, "False": False, "None": None}  # as Qwen's templates write them
_JSON = {"true": True, "false": False, "null": None}  # names in Python
_MOST_PYTHON, _MOST_ENDS = 20_000, 500  # characters of a call, and brackets that may end it
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
_AFTER = re.compile(r"\s*[],]?\s*(?:</tool_call>|<\|/tool_call\|>|<\|tool_call_end\|>)?\s*")
_BARE = re.compile(r"\s*\[?\s*(?:$|\{)")  # an answer that may consist only of calls


def open_tokens(codec: TextCodec) -> frozenset[int]:
    """Ids of tokens that are a tag before calls; as special tokens they do not appear in text."""
    found = map(codec.tokenizer.token_to_id, _OPENS)
    return frozenset(token for token in found if token is not None)


class CallReader:
    """Splits the text of an answer, as it arrives, into content and calls."""

    def __init__(self, tools: list[dict[str, Any]], *, tagged: bool = False):
        """Starts; without tools, all text is content.

        Args:
            tools: tools that may be called.
            tagged: whether a grammar lets a call only begin with its tag, and nothing stand before.
        """
        functions = [tool["function"] for tool in tools]
        self._schemas = {one["name"]: one.get("parameters") or {} for one in functions}
        self._held, self._spoke, self._opened, self._tagged = "", False, False, tagged

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
        if self._tagged:
            begun = self._held.lstrip()
            if any(begun.startswith(tag) or tag.startswith(begun) for tag in _OPENS):
                return ""
            self._schemas, said, self._held = {}, self._held, ""  # the other form: never a call
            return said
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
        if name := found[1]:
            short = name[:-9]  # without an identifier, whose tag does not appear in the text
            if name not in self._schemas and short in self._schemas and name[-9:].isalnum():
                name = short
            written = _in_json(text, found.end(), name)
        elif found[2]:
            written = _in_python(text, start, found[2]) if found[2] in self._schemas else None
        else:
            written = _in_json(text, start) if text[start] == "{" else self._in_tags(text, start)
        if written is None or written[0] not in self._schemas:
            return None, 0
        name, arguments, end = written
        if isinstance(arguments, str):  # some write them as they are sent
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments or "{}", parse_constant=str)
        arguments = json.dumps({} if arguments is None else arguments)
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
        call, end = json.JSONDecoder(parse_constant=str).raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    if known:
        return known, call, end
    name = call.get("name")
    if not isinstance(name, str):
        return None
    return name, call.get("arguments", call.get("parameters", {})), end


def _in_python(text: str, start: int, name: str) -> tuple[str, Any, int] | None:
    """Name and arguments of a call in Python, which are literals, and where it ends."""
    most, first = start + _MOST_PYTHON, start + len(name)
    end = first
    for _ in range(_MOST_ENDS):
        if not (end := text.find(")", end, most) + 1):
            break
        with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            call = ast.parse(f"f{text[first:end]}", mode="eval").body
            if not isinstance(call, ast.Call) or call.args:
                return None
            return name, {str(one.arg): _literal(one.value) for one in call.keywords}, end
    return None


def _literal(node: ast.expr | None) -> Any:
    """The value of a literal that JSON has, too.

    Raises:
        ValueError: it is anything else.
    """
    if isinstance(node, ast.Name) and node.id in _JSON:
        return _JSON[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {str(_literal(key)): _literal(value) for key, value in pairs}
    value = ... if node is None else ast.literal_eval(node)  # None: of `**` in a dict
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and math.isfinite(value):
        return value
    raise ValueError


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
