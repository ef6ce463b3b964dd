"""How calls of tools are found in a model's output.

A call is `{"name": ..., "arguments": ...}`. Families write it alone or in a list, with their own
tags around it, see `FORMS` and `_READ`, or without any, as Llama 3 does. Qwen3-Coder, Qwen3.5 and
GLM write its parts as tags instead of JSON, later models of Mistral and gpt-oss only its arguments
as JSON, Gemma 4 as JSON with its own quotes, and LFM2 a call in Python.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import math
import re
import uuid
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

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
_RECIPIENT = "to=functions."  # in the header of gpt-oss's message, before the name of a function
_QUOTE = '<|"|>'  # Gemma 4's
_READ = (  # tags before and after calls that only a model's own template writes
    ("<|tool_call>", "<tool_call|>"),  # Gemma 4
    ("<|START_ACTION|>", "<|END_ACTION|>"),  # Command R7B
    ("<tool_calls>", "</tool_calls>"),  # Apriel
    # Tags with the name of a function, which Qwen3-Coder may write without the tag before them.
    ("<function=", ""),
    ('<function name="', ""),  # MiniCPM 5
)
_OPENS = tuple(dict.fromkeys([*(form.open for form in (HERMES, *FORMS)), *(o for o, _ in _READ)]))
_CLOSES = tuple(dict.fromkeys([*(form.close for form in (HERMES, *FORMS)), *(c for _, c in _READ)]))
_INSIDE = (_QUOTE, "[CALL_ID]", "[ARGS]", "<|channel|>", "<|constrain|>", "<|message|>")
SPECIAL = (*_OPENS, *filter(None, _CLOSES), "<|call|>", *_INSIDE)
"""What counts as text of an answer that may call tools, though it may be a special token."""

_HEADER = (  # the end of gpt-oss's; bounded, or a search of long text would take forever
    r"(?:<\|channel\|>\w{1,30})?(?:(?: |(?: ?<\|constrain\|>))\w{1,30})?<\|message\|>"
)
_CALLED = re.compile(rf"{re.escape(_RECIPIENT)}[\w-]{{1,64}}{_HEADER}$")
_NAMED = (
    r"(?P<named>[\w-]{1,64})(?:\[CALL_ID\]\w*)?"
    rf"(?:(?:\[ARGS\]|{_HEADER})\s*)?(?=\{{)"
)
_TAGGED = (
    r"<\|tool_call>call:(?P<quoted>[\w-]{1,64})(?=\{)"
    r'|<function(?:=| name=")(?P<function>[^>"\n]+)"?>\s*'
    r"|<tool_call>\s*(?P<keyed>[\w-]{1,64})\s*(?=<arg_key>|</tool_call>)"
)
_CALL = re.compile(rf"{_NAMED}|\{{|{_TAGGED}|(?P<python>[\w-]{{1,64}})\(")
_PARAMETER = re.compile(
    r'<(?P<tag>param(?:eter)?)(?P<is>=| name=")(?P<name>[^>"\n]+)"?>\n?'
    r"(?P<value><!\[CDATA\[.*?\]\]>|.*?)\n?</(?P=tag)>\s*(?=<(?P=tag)(?P=is)|</function>)",
    re.DOTALL,
)
_PAIR = re.compile(
    r"<arg_key>(?P<name>[^<\n]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>\s*"
    r"(?=<arg_key>|</tool_call>|$)",
    re.DOTALL,
)
_END = re.compile(r"(?P<function></function>)|(?=</tool_call>)|$")
_VERBATIM = re.compile(r"<!\[CDATA\[(.*)\]\]>", re.DOTALL)
_TOKEN = re.compile(  # of a Gemma 4 call's arguments
    rf'{re.escape(_QUOTE)}(?P<own>.*?){re.escape(_QUOTE)}|(?P<json>"(?:[^"\\]|\\.)*")'
    r"|(?P<mark>[{}\[\],:])|\s+|(?P<bare>[^{}\[\],:\"<]+|.)",
    re.DOTALL,
)


def _number(text: str) -> float | str:
    """A number that JSON has, or its text: a model may write any."""
    return value if math.isfinite(value := float(text)) else text


_AS_WRITTEN: Any = {"parse_float": _number, "parse_constant": str}
_JSON = {"true": True, "false": False, "null": None}  # names in Python
_NO_LITERAL = SyntaxError, ValueError, TypeError, OverflowError, RecursionError, MemoryError
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
# What may follow a call.
_AFTER = re.compile(rf"\s*[],;]?\s*(?:{'|'.join(map(re.escape, filter(None, _CLOSES)))})?\s*")
_BARE_OPENS = '{"name":"', '{"type":"function","name":"'  # without spaces
_BARE = re.compile(r"\s*\[?\s*(?:$|\{)")  # an answer that may consist only of calls


def recipient(text: str) -> str:
    """The end of a text that is a header of gpt-oss, from where it names a function; or ""."""
    found = _CALLED.search(text)
    return found[0] if found else ""


class CallReader:
    """Splits the text of an answer, as it arrives, into content and calls.

    Attributes:
        cut: whether the answer ended inside a call.
    """

    def __init__(self, tools: list[dict[str, Any]], *, tagged: bool = False):
        """Starts; without tools, all text is content.

        Args:
            tools: tools that may be called.
            tagged: whether a grammar lets a call only begin with its tag, and nothing stand before.
        """
        functions = [tool["function"] for tool in tools]
        self._schemas = {one["name"]: one.get("parameters") or {} for one in functions}
        self._held, self._spoke, self._tagged = "", False, tagged
        self._limited = self.cut = False

    def add(self, text: str) -> str:
        """Adds text; returns the part that is certainly content, as the rest may be a call."""
        if not self._schemas:
            return text
        self._held += text
        if self._tagged:
            begun = self._held.lstrip()
            if any(begun.startswith(tag) or tag.startswith(begun) for tag in _OPENS):
                return ""
            self._schemas, said, self._held = {}, self._held, ""  # the other form: never a call
            return said
        if not self._spoke and self._held.strip() and _BARE.match(self._held):
            return ""
        if not self._spoke and begins(self._held.lstrip(), _RECIPIENT) == 0:
            return ""
        at = min(begins(self._held, tag) for tag in _OPENS)
        said, self._held = self._held[:at], self._held[at:]
        self._spoke = self._spoke or bool(said.strip())
        return said

    def finish(self, *, limited: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """The remaining content at the end, and the calls in OpenAI's form.

        Args:
            limited: whether a limit ended the answer, so that its last call may not be whole.
        """
        said, left, calls, rest = "", "", list[dict[str, Any]](), self._held
        self._held, self._limited = "", limited
        while rest:
            found = _CALL.search(rest)
            at = found.start() if found else len(rest)
            call, end = self._call(found) if found else (None, 0)
            if call is None:
                left, rest = left + rest[: at + 1], rest[at + 1 :]
                continue
            said, left = said + left + _without_tag(rest[:at]), ""
            calls.append(call)
            rest = rest[end:]
            rest = rest[_AFTER.match(rest).end() :]  # type: ignore[union-attr]
        if limited and self._schemas:
            whole, left = left, _before_cut_call(left, self._schemas, further=bool(calls))
            self.cut = left != whole
            if calls and any(tag.startswith(left) for tag in _CLOSES):
                left = ""  # the call is whole, its tag is not
        return said + left, calls

    def _call(self, found: re.Match[str]) -> tuple[dict[str, Any] | None, int]:
        """The call that begins at a match of `_CALL`, if any, and where it ends."""
        text, start, name = found.string, found.start(), found[found.lastgroup or 0]
        if found.lastgroup is None:
            written = _in_json(text, start)
        elif name not in self._schemas:
            written = None
        elif found["named"]:
            written = _in_json(text, found.end(), name)
        elif found["quoted"]:
            written = _in_own_quotes(text, found.end(), name)
        elif found["python"]:
            written = _in_python(text, start, name)
        else:
            written = self._in_tags(found, name)
        if written is None or written[0] not in self._schemas:
            return None, 0
        name, arguments, end = written
        if isinstance(arguments, str):  # some write them as they are sent
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments or "{}", **_AS_WRITTEN)
        arguments = json.dumps({} if arguments is None else arguments)
        whole = arguments.encode("utf-8", "replace").decode()  # lone surrogates cannot be sent
        function = {"name": name, "arguments": whole}
        number = uuid.uuid4().hex[:9]  # the only length that Mistral's templates accept
        return {"id": number, "type": "function", "function": function}, end

    def _in_tags(self, begun: re.Match[str], name: str) -> tuple[str, Any, int] | None:
        """Name and arguments of a call in tags, and where it ends."""
        text, end = begun.string, begun.end()
        document, arguments = self._schemas[name], {}
        schema = _part(document, str(document.get("$ref", "#")))
        pattern = _PAIR if begun["keyed"] else _PARAMETER
        while found := pattern.match(text, end):
            kinds = _kinds(_member(_member(schema, "properties"), found["name"]), document)
            written = _VERBATIM.fullmatch(found["value"])
            arguments[found["name"]] = _value(written[1] if written else found["value"], kinds)
            end = found.end()
        closed = _END.match(text, end)
        if closed is None or bool(closed["function"]) != bool(begun["function"]):
            return None
        if self._limited and begun["keyed"] and closed.end() == len(text):
            return None  # other arguments may follow
        return name, arguments, closed.end()


def _in_own_quotes(text: str, start: int, name: str) -> tuple[str, Any, int] | None:
    """Name and arguments of a call of Gemma 4, `{key:<|"|>value<|"|>}`, and where it ends."""
    parts, depth, bare = list[str](), 0, False
    for found in _TOKEN.finditer(text, start):
        mark = found["mark"] or ""
        if mark == ":" and bare:  # behind a key
            parts[-1] = json.dumps(parts[-1])
        bare = found["bare"] is not None
        if found["own"] is not None:
            parts.append(json.dumps(found["own"]))
        elif found.lastgroup is not None:
            parts.append("null" if found[0].strip() == "None" else found[0].strip())
        depth += (mark in "{[") - (mark in "}]") if mark else 0
        if mark and not depth:
            with contextlib.suppress(ValueError, RecursionError):
                return name, json.loads("".join(parts), **_AS_WRITTEN), found.end()
            break
    return None


def _in_json(text: str, start: int, known: str = "") -> tuple[str, Any, int] | None:
    """Name and arguments of a call in JSON, which are all of it if its name is known."""
    try:
        call, end = json.JSONDecoder(**_AS_WRITTEN).raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    if known:
        return known, call, end
    name = call.get("tool_name" if "tool_name" in call and "parameters" in call else "name")
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
        with contextlib.suppress(*_NO_LITERAL):
            call = _parsed(f"f{text[first:end]}")
            if not isinstance(call, ast.Call) or call.args:
                return None
            return name, {str(one.arg): _literal(one.value) for one in call.keywords}, end
    return None


def _parsed(text: str) -> ast.expr:
    """An expression in Python; the grammar of later versions prints warnings of escapes."""
    return ast.parse(text, mode="eval", feature_version=(3, 11)).body


def _from_python(text: str) -> Any:
    """The value of a literal, as templates that print values write it; else the text."""
    if len(text) > _MOST_PYTHON:
        return text
    try:
        return _literal(_parsed(text))
    except _NO_LITERAL:
        return text


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
        value = json.loads(text, **_AS_WRITTEN)
    except (ValueError, RecursionError):
        value = _from_python(text)
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


def _before_cut_call(text: str, names: Collection[str], *, further: bool) -> str:
    """A text without a call at its end that has begun, but does not end.

    Args:
        text: what is left of an answer that its limit cuts off.
        names: names of the tools.
        further: whether calls come before the text: a list of them may go on without a tag.
    """
    at = max(text.rfind(tag) for tag in (*_OPENS, _RECIPIENT))
    if at >= 0 and not any(tag in text[at:] for tag in (*_CLOSES, "</function>") if tag):
        return _without_tag(text[:at])
    bare = "".join(text.split()).removeprefix("[")
    starts = [f'{opened}{name}"' for opened in _BARE_OPENS for name in names]
    if further:
        starts += ['{"tool_name":"', '{"tool_call_id":"', *(f"{name}(" for name in names)]
    begun = any(start.startswith(bare) or bare.startswith(start) for start in starts)
    certain = further or bare.startswith(_BARE_OPENS)
    whole = bare.startswith("{") and _in_json(text, text.find("{")) is not None
    return "" if bare and begun and certain and not whole else text


def _without_tag(text: str) -> str:
    """The text before a call, without the tag or bracket that belongs to the call."""
    text = text.rstrip().removesuffix("[").rstrip()
    for tag in (*_OPENS, _RECIPIENT):
        text = text.removesuffix(tag)
    return text.rstrip()
