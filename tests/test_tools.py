"""Tools: calls in tags, tags that are special tokens, schemas with references."""

from __future__ import annotations

import enum
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.text import TextCodec
from dash_onnx.core.thoughts import Tags, Thoughts
from dash_onnx.runtime.grammar import Constraint, guidance_tokenizer
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.results import GeneratedToken
from dash_onnx.runtime.writer import TextWriter
from dash_onnx.serve.answer import Choice
from dash_onnx.serve.calls import SPECIAL, CallReader
from dash_onnx.serve.tools import checked_tools, forced_call

COUNT: dict[str, Any] = {"type": "function", "function": {"name": "count"}}
CALL = '{"name": "count", "arguments": {"ships": 3}}'


def tool(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def read(
    text: str, tools: list[dict[str, Any]], size: int = 1
) -> tuple[str, list[tuple[str, Any]]]:
    """Content, and the name and arguments of each call, of text that comes in pieces."""
    reader, said = CallReader(tools), ""
    for start in range(0, len(text), size):
        said += reader.add(text[start : start + size])
    rest, calls = reader.finish()
    functions = [call["function"] for call in calls]
    return said + rest, [(one["name"], json.loads(one["arguments"])) for one in functions]


# Qwen3-Coder's calls


class Weather(enum.Enum):
    FINE, FOUL = "fine", "7"


class Rank(enum.IntEnum):
    MATE, MASTER = 1, 2


class Crew(BaseModel):
    size: int


class Voyage(BaseModel):
    text: str
    ships: int
    depth: float
    night: bool
    ports: list[str]
    crew: Crew
    weather: Weather
    rank: Rank
    none: None
    maybe: str | None
    either: int | str
    free: Any


VOYAGE = tool("sail", Voyage.model_json_schema())


def in_tags(name: str, **values: str) -> str:
    lines = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items()]
    return f"<tool_call>\n<function={name}>\n{''.join(lines)}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("name", "written", "value"),
    [
        ("text", "three\nships\n", "three\nships\n"),
        ("text", "7", "7"),
        ("text", "null", "null"),
        ("text", "", ""),
        ("text", "if a < b: </parameter> {x}", "if a < b: </parameter> {x}"),
        ("ships", "7", 7),
        ("ships", "seven", "seven"),
        ("depth", "2.5", 2.5),
        ("depth", "NaN", "NaN"),
        ("night", "true", True),
        ("night", "True", True),
        ("ports", '["a", "b"]', ["a", "b"]),
        ("ports", "[" * 100_000, "[" * 100_000),
        ("crew", '{"size": 3}', {"size": 3}),
        ("weather", "7", "7"),
        ("rank", "2", 2),
        ("none", "null", None),
        ("maybe", "null", None),
        ("maybe", "7", "7"),
        ("maybe", '"quoted"', '"quoted"'),
        ("either", "7", 7),
        ("either", "seven", "seven"),
        ("free", '{"a": 1}', {"a": 1}),
        ("free", "7", "7"),
        ("unknown", "7", "7"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_parameter_has_the_type_of_its_schema(name: str, written: str, value: Any) -> None:
    text = in_tags("sail", **{name: written})
    assert read(text, [VOYAGE], 997) == ("", [("sail", {name: value})])


@pytest.mark.parametrize(
    ("written", "said"),
    [
        # GLM
        ("<tool_call>sail\n<arg_key>text</arg_key>\n<arg_value>a <b></arg_value>\n{ships}", ""),
        ("ho<tool_call>sail<arg_key>text</arg_key><arg_value>a <b></arg_value>{ships}", "ho"),
        # MiniCPM 5
        (
            '<function name="sail"><param name="text"><![CDATA[a <b>]]></param>'
            '<param name="ships">7</param></function>',
            "",
        ),
        # Gemma 4
        ('ho<|tool_call>call:sail{text:<|"|>a <b><|"|>,ships:7}<tool_call|>', "ho"),
        ('<|tool_call>call:sail{ships:7,<|"|>text<|"|>:<|"|>a <b><|"|>}', ""),
        # Command R7B
        (
            '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "sail", "parameters": '
            '{"text": "a <b>", "ships": 7}}\n]<|END_ACTION|>',
            "",
        ),
        # Apriel
        ('<tool_calls>[{"name": "sail", "arguments": {"text": "a <b>", "ships": 7}}]', ""),
        # gpt-oss
        ('to=functions.sail<|channel|>commentary json<|message|>{"text": "a <b>", "ships": 7}', ""),
    ],
    ids=lambda text: text[:20],
)
@pytest.mark.parametrize("size", [1, 7, 997])
def test_calls_are_read_in_the_form_of_a_family(written: str, said: str, size: int) -> None:
    ships = "<arg_key>ships</arg_key><arg_value>7</arg_value></tool_call>"
    call = "sail", {"text": "a <b>", "ships": 7}
    assert read(written.replace("{ships}", ships), [VOYAGE], size) == (said, [call])
    twice = written.replace("{ships}", ships) * 2
    if not said:
        assert read(twice, [VOYAGE], size) == ("", [call, call])


@pytest.mark.parametrize(
    ("written", "values"),
    [
        ("maybe:None", {"maybe": None}),
        ("maybe: None, ports: [None, None]", {"maybe": None, "ports": [None, None]}),
        ('"text": "hi, note: \\"x", ships: -7', {"text": 'hi, note: "x', "ships": -7}),
        ('crew:{of:[true,None,1.5],"x":{}}', {"crew": {"of": [True, None, 1.5], "x": {}}}),
        ('text:<|"|>{a:1}, "b"\n<|"|>', {"text": '{a:1}, "b"\n'}),
        ('text:<|"|><|"|>, ports:[<|"|>a<|"|>,<|"|>b:<|"|>]', {"text": "", "ports": ["a", "b:"]}),
        ("", {}),
    ],
)
def test_values_are_read_as_gemma_4_writes_them(written: str, values: dict[str, Any]) -> None:
    assert read(f"<|tool_call>call:sail{{{written}}}", [VOYAGE], 3) == ("", [("sail", values)])


@pytest.mark.parametrize(
    "value",
    [
        '<object><param name="a">1</param>\n<param name="b">2</param></object>',
        "<param><value>1</value></param>\n<param><value>2</value></param>",
        '<parameter name="a">1</parameter>\n<parameter name="b">',
        'in Gemma: <|tool_call>call:f{a:<|"|>1<|"|>, note: y}<tool_call|>',
    ],
)
def test_a_value_may_hold_what_other_families_write(value: str) -> None:
    assert read(in_tags("sail", text=value), [VOYAGE], 5) == ("", [("sail", {"text": value})])
    call = json.dumps({"name": "sail", "arguments": {"text": value}})
    for tags in (("<tool_call>\n", "\n</tool_call>"), ("[TOOL_CALLS][", "]")):
        text = call.join(tags)
        assert read(text, [VOYAGE], 5) == ("", [("sail", {"text": value})])
    written = f'<function name="sail"><param name="text"><![CDATA[{value}]]></param></function>'
    assert read(written, [VOYAGE], 5) == ("", [("sail", {"text": value})])


def test_text_that_only_looks_like_a_call_is_delivered_at_once() -> None:
    reader = CallReader([VOYAGE, COUNT])
    words = ["I", " want", " to", " wait", " but", " not", ' <|"|>and, note: x', " now."]
    assert [reader.add(word) for word in words] == words
    text = '{"tool_name": "count", "reason": "ships"}'
    assert read(text, [COUNT], 3) == (text, [])


@pytest.mark.parametrize("value", ['{{"size": 3}}', "{[1]}", "[1" + "0" * 400 + ", 'a']", "seven"])
def test_a_value_that_is_no_literal_is_text(value: str) -> None:
    assert read(in_tags("sail", crew=value), [VOYAGE], 5) == ("", [("sail", {"crew": value})])


def test_a_call_that_is_cut_off_in_a_long_word_is_said_at_once() -> None:
    text = '{"name": "count", "arguments": {"d": "' + "0" * 10_000
    reader, started = CallReader([COUNT]), time.process_time()
    reader.add(text)
    assert reader.finish() == (text, [])
    assert time.process_time() - started < 2


def test_values_in_python_have_the_type_of_their_schema() -> None:
    values = {"ports": "['a', 'b']", "crew": "{'size': 3}", "night": "True", "text": "['a']"}
    wanted = {"ports": ["a", "b"], "crew": {"size": 3}, "night": True, "text": "['a']"}
    assert read(in_tags("sail", **values), [VOYAGE], 5) == ("", [("sail", wanted)])


@pytest.mark.parametrize(
    "written",
    ["<|tool_call>call:sail{", '<|tool_call>call:sail{a:<|"|>b', "<tool_call>sail<arg_key>a"],
)
def test_a_call_that_is_cut_off_is_said(written: str) -> None:
    said, calls = read(written, [VOYAGE], 3)
    assert said.startswith(written[:10]) and calls == []


@pytest.mark.parametrize(
    "schema",
    [
        None,
        [],
        {"properties": [1]},
        {"properties": {"a": 5}},
        {"properties": {"a": {"$ref": 5}}},
        {"properties": {"a": {"$ref": "#/properties/a"}}},
        {"properties": {"a": {"type": 5}}},
        {"properties": {"a": {"anyOf": [[], {}, None]}}},
        {"$ref": "#/nowhere"},
    ],
    ids=str,
)
def test_a_schema_without_a_type_leaves_text(schema: Any) -> None:
    assert read(in_tags("sail", a="7"), [tool("sail", schema)]) == ("", [("sail", {"a": "7"})])


def test_a_schema_may_consist_of_a_reference() -> None:
    schema = {"$ref": "#/$defs/Crew", "$defs": {"Crew": Crew.model_json_schema()}}
    found = read(in_tags("sail", size="7"), [tool("sail", schema)])
    assert found == ("", [("sail", {"size": 7})])


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_calls_in_tags_follow_text_and_each_other(size: int) -> None:
    text = "I count. " + in_tags("sail", ships="1", text="a") + "\n" + in_tags("count")
    said, calls = read(text, [VOYAGE, COUNT], size)
    assert said.strip() == "I count."
    assert calls == [("sail", {"ships": 1, "text": "a"}), ("count", {})]
    bare = text.replace("<tool_call>\n", "")  # as Qwen3-Coder sometimes writes them
    said, found = read(bare, [VOYAGE, COUNT], size)
    assert said.strip() == "I count." and found == calls


@pytest.mark.parametrize(
    "text",
    [
        in_tags("unknown", ships="7"),
        in_tags("sail", ships="7").partition("</parameter>")[0],  # cut off
        in_tags("sail", ships="7").partition("</function>")[0],
        "write <function=NAME>",
        "<function=",
    ],
)
def test_tags_that_are_no_call_are_said(text: str) -> None:
    assert read(text, [VOYAGE]) == (text, [])


# LFM2's calls


@pytest.mark.parametrize(
    ("written", "calls"),
    [
        ("sail(text='a, (b)', ships=3)", [("sail", {"text": "a, (b)", "ships": 3})]),
        ('sail(ports=["a", "b"], depth=-2.5)', [("sail", {"ports": ["a", "b"], "depth": -2.5})]),
        ("sail(crew={'size': 3}, night=True)", [("sail", {"crew": {"size": 3}, "night": True})]),
        (
            'sail(crew={"of": [true, null, false]})',
            [("sail", {"crew": {"of": [True, None, False]}})],
        ),
        ("sail(maybe=None, night=False)", [("sail", {"maybe": None, "night": False})]),
        (r"sail(text='\d+\.\n')", [("sail", {"text": "\\d+\\.\n"})]),
        ("count()", [("count", {})]),
        ("count(), sail(ships=1)", [("count", {}), ("sail", {"ships": 1})]),
    ],
)
def test_calls_in_python_are_read(written: str, calls: list[Any]) -> None:
    for text in (
        f"<|tool_call_start|>[{written}]<|tool_call_end|>",
        f"<|tool_call_start|>[{written}",
    ):
        assert read(text, [VOYAGE, COUNT], 3) == ("", calls)


@pytest.mark.parametrize(
    "written",
    [
        "sail(3)",
        "sail(ships=3",
        "sail(ships=1e999)",
        "sail(text=b'a')",
        "sail(ships=f())",
        "sail(**x)",
        "sail(crew={**{}})",
        "sail(text=" + "(" * 9000 + ")" * 9000,
        "unknown(ships=3)",
        "a sail (ships=3)",
    ],
    ids=lambda text: text[:20],
)
def test_python_that_is_no_call_is_said(written: str) -> None:
    said, calls = read(f"<|tool_call_start|>[{written}]", [VOYAGE, COUNT], 997)
    assert calls == [] and written in said


def test_numbers_that_json_has_not_are_sent_as_text() -> None:
    text = '<tool_call>{"name": "count", "arguments": {"a": 1e400, "b": NaN}}</tool_call>'
    assert read(text, [COUNT]) == ("", [("count", {"a": "1e400", "b": "NaN"})])


# Tags that are special tokens


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("I will look.[TOOL_CALLS][{}, {}]", "I will look."),
        ("I will look.[TOOL_CALLS] [{}]", "I will look."),
        ("[TOOL_CALLS][{}]", ""),
        (
            "I will look.\n<tool_call>\n{}\n</tool_call><tool_call>\n{}\n</tool_call>",
            "I will look.",
        ),
        ("I look.[TOOL_CALLS]count[ARGS]{A}[TOOL_CALLS]count[ARGS]{A}", "I look."),
        ("[TOOL_CALLS]count{A}", ""),
        ("[TOOL_CALLS]count[CALL_ID]a1b2c3d4e[ARGS]{A}", ""),
        ('[TOOL_CALLS]sail[ARGS]{"ships": 3}', 'sail{"ships": 3}'),  # no tool of this name
        ("I use [TOOL_CALLS] for calls {no", "I use  for calls {no"),
        ("I look.<|tool_call>call:count{ships:3}<tool_call|>", "I look."),
        ("I look.<other>[TOOL_CALLS]count{A}<other>", "I look."),
    ],
)
@pytest.mark.parametrize("stop", [(), ("look. No.",)], ids=["", "stop"])
def test_a_call_after_text_is_found_if_its_tag_is_a_special_token(
    text: str, said: str, stop: tuple[str, ...], tiny_bundle: Path
) -> None:
    codec = TextCodec(Bundle(tiny_bundle))
    codec.tokenizer.add_special_tokens([*SPECIAL, "<other>"])
    written = text.replace("{}", CALL).replace("{A}", '{"ships": 3}')
    choice = answered(codec, written, stop)
    assert choice.text.strip() == said
    functions = [call["function"] for call in choice.calls]
    calls = text.count("{}") + text.count("{A}") + text.count("call:")
    assert [one["name"] for one in functions] == ["count"] * calls
    assert all(json.loads(one["arguments"]) == {"ships": 3} for one in functions)


def answered(
    codec: TextCodec, written: str, stop: tuple[str, ...] = (), tools: Sequence[Any] = (COUNT,)
) -> Choice:
    """An answer with this text, special tokens included, to a request with a tool."""
    codec.tags = Tags.of(codec.tokenizer)
    ids = [*codec.encode(written, add_special_tokens=False).tolist(), 1]
    shown = {codec.tokenizer.token_to_id(text) for text in SPECIAL} - {None}
    added = codec.tokenizer.get_added_tokens_decoder().items()
    codec.control = {token.content: number for number, token in added if token.special}
    writer, choice = TextWriter(codec, 1, stop, (), shown), Choice(codec, [*tools])
    thoughts = Thoughts(codec.tags)
    for number, token in enumerate(ids, 1):
        reason: Any = "stop" if number == len(ids) else None
        thinking = thoughts.took(token)
        chunk = writer.add(GeneratedToken(token, ("full",), 0.0, reason, thinking=thinking))
        choice.add(chunk)
        if chunk.finish_reason is not None:
            break
    return choice


@pytest.mark.parametrize("stop", ["\n", '"arg', "ships"])
def test_a_call_that_a_stop_string_cuts_is_no_text(stop: str, tiny_bundle: Path) -> None:
    codec = TextCodec(Bundle(tiny_bundle))
    choice = answered(codec, f"Ho!<tool_call>\n{CALL}\n</tool_call>", (stop,))
    assert (choice.text, choice.calls, choice.finished("stop")) == ("Ho!", [], "stop")


@pytest.mark.parametrize(
    ("header", "called"),
    [
        ("<|channel|>commentary to=functions.count <|constrain|>json<|message|>", True),
        ("<|start|>assistant to=functions.count<|channel|>commentary json<|message|>", True),
        ("<|channel|>commentary to=functions.count<|message|>", True),
        ("<|channel|>commentary to=functions.sail<|message|>", False),  # no tool of this name
        ("<|channel|>final<|message|>", False),
    ],
)
@pytest.mark.parametrize("thought", ["", "<|channel|>analysis<|message|>Count.<|end|>"])
def test_calls_of_gpt_oss_are_named_in_a_header(
    header: str, called: bool, thought: str, tiny_bundle: Path
) -> None:
    codec = TextCodec(Bundle(tiny_bundle))
    words = ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>"]
    codec.tokenizer.add_special_tokens(words)
    codec.tokenizer.add_tokens(["final", "\u0120to"])
    start = "<|start|>assistant"  # with which the prompt ends
    written = thought + (start if thought else "") + header.removeprefix(start)
    choice = answered(codec, written + '{"ships": 3}')
    assert choice.reasoning.startswith("Count." if thought else "")
    assert [call["function"]["name"] for call in choice.calls] == ["count"] * called
    assert (choice.text.strip() == "") == called, choice.text
    assert "<|" not in choice.text


@pytest.mark.parametrize("tools", [[], [COUNT]], ids=["", "tools"])
def test_gpt_oss_may_name_others_in_a_header_or_a_function_in_its_thoughts(
    tools: list[Any], tiny_bundle: Path
) -> None:
    codec = TextCodec(Bundle(tiny_bundle))
    codec.tokenizer.add_special_tokens(["<|start|>", "<|channel|>", "<|message|>", "<|end|>"])
    codec.tokenizer.add_tokens(["final", "\u0120to"])
    final = "<|end|><|start|>assistant<|channel|>final<|message|>Three."
    for header in ("commentary to=assistant<|channel|>analysis", "commentary to=python code"):
        said = f"<|channel|>{header}<|message|>I write to=functions.count? No.{final}"
        choice = answered(codec, said, tools=tools)
        assert (choice.text, choice.calls) == ("Three.", [])
        assert choice.reasoning == "I write to=functions.count? No."


def test_a_tag_among_thoughts_or_without_tools_opens_no_call(tiny_bundle: Path) -> None:
    codec = TextCodec(Bundle(tiny_bundle))
    codec.tokenizer.add_special_tokens(["<tool_call>"])
    tag = codec.tokenizer.token_to_id("<tool_call>")
    (plain,) = codec.encode("a", add_special_tokens=False).tolist()
    for tools, thinking, said in (([COUNT], True, "a"), ([], False, "a"), ([COUNT], False, "")):
        writer = TextWriter(codec, 1, (), (), {tag} if tools else ())
        choice = Choice(codec, tools)
        choice.add(writer.add(GeneratedToken(tag, ("full",), 0.0, thinking=thinking)))
        assert choice.add(writer.add(GeneratedToken(plain, ("full",), 0.0)))[0] == said


# A call that is asked for


def allows(tools: list[dict[str, Any]], call: dict[str, Any], codec: TextCodec) -> bool:
    """Whether the grammar of a required call allows this one."""
    grammar = forced_call(checked_tools(tools), "required", codec)
    assert grammar is not None
    constraint, logits = Constraint(grammar, guidance_tokenizer(codec, 384)), np.zeros(384)
    text = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
    for token in codec.encode(text, add_special_tokens=False).tolist():
        if np.isinf(constraint.masked(logits)[token]):
            return False
        constraint.took(token)
    return True


COLOR: dict[str, Any] = {
    "$defs": {"X": {"enum": ["red", "blue"]}},
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/X"}},
    "required": ["x"],
    "additionalProperties": False,
}
TREE: dict[str, Any] = {
    "$defs": {
        "X": {
            "type": "object",
            "properties": {"v": {"type": "integer"}, "x": {"$ref": "#/$defs/X"}},
            "required": ["v"],
            "additionalProperties": False,
        }
    },
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/X"}},
    "required": ["x"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "more", [{}, {"$id": "https://a.example/schema"}, {"$schema": "http://json-schema.org/schema#"}]
)
def test_references_are_to_the_schema_of_their_own_tool(
    more: dict[str, Any], tiny_model: Model
) -> None:
    tools = [tool("paint", {**COLOR, **more}), tool("grow", {**TREE, **more})]
    for name, x, allowed in (
        ("paint", "red", True),
        ("paint", "green", False),
        ("paint", {"v": 1}, False),
        ("grow", {"v": 1}, True),
        ("grow", {"v": 1, "x": {"v": 2, "x": {"v": 3}}}, True),
        ("grow", {"v": 1, "x": {"v": "red"}}, False),
        ("grow", "red", False),
    ):
        call = {"name": name, "arguments": {"x": x}}
        assert allows(tools, call, tiny_model.text) == allowed, call


def test_a_schema_of_an_older_draft_may_be_a_reference(tiny_model: Model) -> None:
    schema = {"$ref": "#/definitions/Color", "definitions": {"Color": COLOR["$defs"]["X"]}}
    schema["$schema"] = "http://json-schema.org/draft-07/schema#"
    for color, allowed in (("red", True), ("green", False)):
        call = {"name": "paint", "arguments": color}
        assert allows([tool("paint", schema)], call, tiny_model.text) == allowed


@pytest.mark.parametrize("parameters", [5, "text", [1], True])
def test_parameters_that_are_no_schema_are_refused(parameters: Any) -> None:
    with pytest.raises(PolicyError, match="must be a JSON schema"):
        checked_tools([tool("count", parameters)])
