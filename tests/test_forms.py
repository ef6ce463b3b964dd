"""Answers of a given form: grammars, log probabilities, calls of tools."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from conftest import save_tiny
from hypothesis import given
from hypothesis import strategies as st
from test_serve import MESSAGES, Server, client, server  # noqa: F401

import dash_onnx
from dash_onnx.core.conversation import rendered
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.statistics import log_softmax
from dash_onnx.core.text import TextCodec
from dash_onnx.runtime.grammar import Grammar
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.serve.calls import CallReader
from dash_onnx.serve.tools import call_or_answer, decoded, forced_call, support_of, with_tools

SCHEMA = {
    "type": "object",
    "properties": {
        "ships": {"type": "integer", "minimum": 0, "maximum": 99},
        "at": {"enum": ["night", "noon"]},
    },
    "required": ["ships", "at"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "count", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "wait"}}


def fits(text: str) -> bool:
    found = json.loads(text)
    return (
        set(found) == {"ships", "at"}
        and 0 <= found["ships"] <= 99
        and found["at"] in ("night", "noon")
    )


# The runtime


@pytest.mark.parametrize("given", [{}, {"speculate": False}, {"temperature": 5.0}], ids=str)
def test_a_schema_is_kept_by_a_model_that_knows_nothing(
    given: dict[str, Any], tiny_model: Model
) -> None:
    grammar = Grammar.json_schema(SCHEMA)
    for seed in range(10):
        text = tiny_model.generate("the keeper", grammar=grammar, seed=seed, **given)
        assert fits(text), text
        assert text.finish_reason == "stop"


def test_regular_expressions_and_grammars_are_kept(tiny_model: Model) -> None:
    assert tiny_model.generate("a", grammar=Grammar.regex("(aye|nay)!")) in ("aye!", "nay!")
    grammar = Grammar.lark('start: "a" pair\npair: "(" pair ")" | "b"')
    text = tiny_model.generate("a", grammar=grammar, temperature=1.0, seed=3, max_new_tokens=500)
    inner = text[1:]
    assert text.startswith("a") and inner.count("(") == inner.count(")") and "b" in inner


def test_a_batch_keeps_a_form_for_each(tiny_model: Model) -> None:
    options = GenerationOptions(grammar=Grammar.json_schema(SCHEMA), temperature=2.0)
    assert all(map(fits, tiny_model.batch(["the keeper"] * 12, options=options, parallel=5)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Grammar.json_schema({"type": "no such type"}),
        lambda: Grammar.json_schema([1]),  # type: ignore[arg-type]
        lambda: Grammar.regex("(("),
        lambda: Grammar.lark("start: nothing"),
        lambda: Grammar.lark('start: / "x"\n'),
    ],
)
def test_what_is_no_grammar_is_refused_in_one_line(make: Any, tiny_model: Model) -> None:
    with pytest.raises(PolicyError) as error:
        tiny_model.generate("a", grammar=make())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("speculate", [False, True])
def test_log_probabilities_are_the_models_own(speculate: bool, tiny_model: Model) -> None:
    ids = tiny_model.text.encode("the keeper the keeper the")
    steps = [
        *tiny_model.generate_step(
            ids, policy="full", logprobs=4, max_new_tokens=9, ignore_eos=True, speculate=speculate
        )
    ]
    tokens = [step.token for step in steps]
    logits = tiny_model.logits([*ids.tolist(), *tokens], policy="full")[len(ids) - 1 : -1]
    for step, row in zip(steps, log_softmax(logits), strict=True):
        assert step.logprobs is not None
        np.testing.assert_allclose(step.logprobs.token, row[step.token], atol=1e-3)
        assert [token for token, _ in step.logprobs.top] == np.argsort(-row)[:4].tolist()
    assert all(chunk.logprobs is None for chunk in tiny_model.stream("a", max_new_tokens=2))


# Calls


CALL = {"name": "count", "arguments": {"ships": 3, "at": "noon"}}


@given(st.sampled_from(["", "I count. ", "a < b <tool", "{no"]), st.data())
def test_a_call_is_found_however_its_text_is_cut(said: str, data: st.DataObject) -> None:
    text = f"{said}<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    reader, found = CallReader([TOOL, OTHER]), ""
    for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
        found += reader.add(text[start:stop])
    rest, calls = reader.finish()
    assert found + rest == said
    assert [call["function"]["name"] for call in calls] == ["count"]
    assert json.loads(calls[0]["function"]["arguments"]) == CALL["arguments"]


@pytest.mark.parametrize(
    ("text", "said", "names"),
    [
        ('{"name": "wait", "parameters": {}}', "", ["wait"]),  # as Llama writes it
        ('<tool_call>{"name": "wait"}</tool_call>\n<tool_call>{"name": "count"}', "", [0, 1]),
        ("<tool_call>three</tool_call>", "<tool_call>three</tool_call>", []),
        ('{"name": "wait"}\n{"name": "count"}', "", [0, 1]),  # where tags are special tokens
        ('{"name": "unknown"}', '{"name": "unknown"}', []),
        ('{"ships": 3}', '{"ships": 3}', []),
        ("no call at all <", "no call at all <", []),
    ],
)
def test_what_is_no_call_is_said(text: str, said: str, names: list[Any]) -> None:
    reader = CallReader([TOOL, OTHER])
    found = reader.add(text)
    rest, calls = reader.finish()
    assert found + rest == said
    assert len(calls) == len(names)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[TOOL_CALLS] [{}, {}]", ""),  # Mistral
        ("[TOOL_CALLS][{}]", ""),
        (" [{}, {}]", ""),  # where the tag is a special token
        ("<|tool_call|>[{}]", ""),  # Granite 3
        ("<tool_call>[{}]", ""),
        ("<|tool_call|>[{}, {}]<|/tool_call|>", ""),  # Phi 4
        ("I count. <|tool_call|>[{}]<|/tool_call|>", "I count."),
        ("[1] is no call", "[1] is no call"),
        ("[", "["),
    ],
)
def test_calls_are_found_as_each_family_writes_them(text: str, said: str) -> None:
    text = text.replace("{}", json.dumps(CALL))
    for size in (1, 3, len(text)):
        reader, found = CallReader([TOOL, OTHER]), ""
        for start in range(0, len(text), size):
            found += reader.add(text[start : start + size])
        rest, calls = reader.finish()
        assert (found + rest).strip() == said
        assert len(calls) == text.count('"count"')
        for call in calls:
            assert json.loads(call["function"]["arguments"]) == CALL["arguments"]
            assert len(call["id"]) == 9


@pytest.mark.parametrize(
    ("template", "pattern"),
    [
        ("{# [TOOL_CALLS] #}", r"\[TOOL_CALLS\]\[HERE\]"),
        ("{# <|tool_call|> #}", r"<\|tool_call\|>\[HERE\]"),
        ("{{ message['tools'] }}<|tool|>", r"<\|tool_call\|>\[HERE\]"),
        (None, r"<tool_call>\nHERE\n</tool_call>"),
    ],
)
def test_a_call_that_is_asked_for_has_the_form_of_its_family(
    template: str | None, pattern: str, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_model.text, "chat_template", template)
    grammar = forced_call([TOOL], "required", tiny_model.text)
    text = str(tiny_model.generate("a", grammar=grammar, max_new_tokens=200))
    call = r'\{"name": "count", "arguments": \{.*\}\}'
    assert re.fullmatch(pattern.replace("HERE", call), text), text
    reader = CallReader([TOOL])
    assert reader.add(text) == "" and len(reader.finish()[1]) == 1


def prepared(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]], template: str | None
) -> list[dict[str, Any]]:
    """Messages as the server gives them to a template."""
    return with_tools(messages, tools, template, support_of(template))


def test_a_template_that_reads_tools_in_a_message_finds_them_there() -> None:
    template, asked = "{{ message['tools'] }}", {"role": "user", "content": "How many?"}
    first, second = prepared([asked], [TOOL], template)
    assert json.loads(first["tools"]) == [TOOL["function"]] and second == asked
    system = {"role": "system", "content": "Count."}
    first, _ = prepared([system, asked], [TOOL], template)
    assert first["content"] == "Count." and "count" in first["tools"]
    assert prepared([asked], [], template) == [asked]


def test_a_template_without_tools_is_told_of_them_in_words() -> None:
    asked = {"role": "user", "content": "How many?"}
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "count", "arguments": "{}"}}
        ],
    }
    answered = {"role": "tool", "tool_call_id": "1", "content": "7"}
    talk = decoded([asked, called, answered])
    first, *others = prepared(talk, [TOOL], "no t.o.o.l.s")
    assert first["role"] == "system" and '"count"' in first["content"]
    assert [message["role"] for message in others] == ["user", "assistant", "user"]
    assert '{"name": "count", "arguments": {}}' in others[1]["content"]
    assert "7" in others[2]["content"]
    kept = prepared(talk, [TOOL], QWEN)
    assert [message["role"] for message in kept] == ["user", "assistant", "tool"]
    assert kept[1]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("form", ["QWEN", "LFM2", "BODY"])
def test_a_call_that_a_model_wrote_wrong_stays_in_the_conversation(form: str) -> None:
    broken = {"id": "1", "function": {"name": "count", "arguments": '{"a": '}}
    called = {"role": "assistant", "content": "", "tool_calls": [broken]}
    asked = {"role": "user", "content": "How many?"}
    template = {"QWEN": QWEN, "LFM2": LFM2, "BODY": BODY}[form]
    messages = prepared(decoded([asked, called, asked]), [TOOL], template)
    assert "count" in rendered(template, messages, {"tools": [TOOL]}, {})


HEAD = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
BODY = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}CALL{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QWEN = HEAD + BODY.replace("CALL", "\n<tool_call>\n{{ call.function | tojson }}\n</tool_call>")
QWQ = QWEN.replace("<assistant>", "<assistant><think>")
MISTRAL = HEAD + BODY.replace("CALL", "[TOOL_CALLS][{{ call.function | tojson }}]")
LLAMA3 = HEAD + BODY.replace(
    "CALL",
    '{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}',
)
LFM2 = "List of tools: " + HEAD + BODY.replace("CALL", "")
LFM25 = HEAD + BODY.replace(
    "CALL", "<|tool_call_start|>[{{ call.function.name }}(a=1)]<|tool_call_end|>"
)
PYTHON = HEAD + BODY.replace("CALL", "[{{ call.function.name }}(a=1)]")
GRANITE3 = HEAD + "{# <|tool_call|> #}" + BODY.replace("CALL", "")
SMOLLM3 = HEAD.replace("tools", "xml_tools") + BODY
GEMMA4 = HEAD + BODY.replace("CALL", "<|tool_call>call:{{ call.function.name }}{a:1}<tool_call|>")
GLM = HEAD + BODY.replace(
    "CALL",
    "<tool_call>{{ call.function.name }}<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>",
)
UNKNOWN = HEAD + BODY.replace("CALL", "call:{{ call.function.name }}{a:1}")


@pytest.mark.parametrize(
    ("template", "tools", "call"),
    [
        (QWEN, True, '<tool_call>\n{"name": "count", "arguments": {}}\n</tool_call>'),
        (QWQ, True, '<tool_call>\n{"name": "count", "arguments": {}}\n</tool_call>'),
        (MISTRAL, True, '[TOOL_CALLS][{"name": "count", "arguments": {}}]'),
        (LLAMA3, True, 'aye{"name": "count", "parameters": {}}'),
        (GRANITE3, True, 'aye<|tool_call|>[{"name": "count", "arguments": {}}]'),
        (HEAD + BODY, False, 'aye\n<tool_call>\n{"name": "count", "arguments": {}}\n</tool_call>'),
        (LFM2, True, "aye<|tool_call_start|>[count()]<|tool_call_end|>"),
        (LFM25, True, "aye<|tool_call_start|>[count(a=1)]<|tool_call_end|>"),
        (PYTHON, False, 'aye\n<tool_call>\n{"name": "count", "arguments": {}}\n</tool_call>'),
        (GEMMA4, True, "aye<|tool_call>call:count{a:1}<tool_call|>"),
        (GLM, True, "aye<tool_call>count<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"),
        (UNKNOWN, False, 'aye\n<tool_call>\n{"name": "count", "arguments": {}}\n</tool_call>'),
        (SMOLLM3, False, 'aye\n<tool_call>\n{"name": "count", "arguments": {}}\n</tool_call>'),
        (BODY, False, 'aye\n<tool_call>\n{"name": "count", "arguments": {}}\n</tool_call>'),
    ],
    ids="qwen qwq mistral llama3 granite3 silent lfm2 lfm25 python gemma4 glm "
    "unknown smollm3 none".split(),
)
def test_every_template_shows_tools_and_calls_in_a_form_that_is_read(
    template: str, tools: bool, call: str
) -> None:
    asked, answer = {"role": "user", "content": "How many?"}, {"role": "tool", "content": "7"}
    before = {**called("count"), "content": "aye"}
    support = support_of(template)
    messages = prepared(decoded([asked, before, answer]), [TOOL], template)
    values = {"tools": [TOOL] if support.tools else None}
    text = rendered(template, messages, values, {})
    assert support.tools == tools and text.count("count") >= 2, text  # once in the call
    assert call in text and "7" in text


PHI4 = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message %}"
    "{{ '<|system|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
)


def called(*names: str) -> dict[str, Any]:
    """A message with calls, as the server sends it."""
    calls = [
        {"id": str(n), "type": "function", "function": {"name": name, "arguments": "{}"}}
        for n, name in enumerate(names)
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def test_phi_4_reads_its_own_calls_in_later_turns() -> None:
    asked, answer = {"role": "user", "content": "How many?"}, {"role": "tool", "content": "7"}
    for tools in ([TOOL], []):
        talk = decoded([asked, called("count"), answer])
        text = rendered(PHI4, prepared(talk, tools, PHI4), {}, {})
        call = '<|assistant|><|tool_call|>[{"name": "count", "arguments": {}}]<|/tool_call|>'
        assert call in text and text.endswith("<|tool|>7<|end|>")
        assert ("<|/tool|>" in text) == bool(tools)


def test_answers_of_tools_and_the_user_are_one_turn_for_templates_without_tools() -> None:
    asked, more = ({"role": "user", "content": text} for text in ("How many?", "And now?"))
    answers = [{"role": "tool", "content": "7"}, {"role": "tool", "content": "12"}]
    talk = decoded([asked, called("count", "wait"), *answers, more])
    found = prepared(talk, [TOOL, OTHER], "x")
    assert [message["role"] for message in found] == ["system", "user", "assistant", "user"]
    last = found[-1]["content"]
    assert last.index("7") < last.index("12") < last.index("And now?")


GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
)


def test_a_template_without_system_messages_gets_their_text_from_the_user() -> None:
    asked = {"role": "user", "content": "How many?"}
    text = rendered(GEMMA, [{"role": "system", "content": "Be brief."}, asked], {}, {})
    assert text == "user: Be brief.\n\nHow many?|"
    assert rendered(GEMMA, prepared([asked], [TOOL], GEMMA), {}, {}).endswith("How many?|")
    twice = [{"role": "system", "content": text} for text in ("Be brief.", "Be kind.")]
    assert rendered(GEMMA, [*twice, asked], {}, {}) == "user: Be brief.\n\nBe kind.\n\nHow many?|"
    silent = "{% for m in messages if m.role != 'system' %}{{ m.content }}|{% endfor %}"
    assert rendered(silent, [*twice, asked], {}, {}) == "Be brief.\n\nBe kind.\n\nHow many?|"
    with pytest.raises(PolicyError, match="not supported"):
        rendered(GEMMA, twice, {}, {})


def test_tools_are_told_in_their_own_letters() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "\u83b7\u53d6"}}
    asked = {"role": "user", "content": "?"}
    for template in ("x", "{{ message['tools'] }}"):
        (first, *_) = prepared([asked], [tool], template)
        assert "\u83b7\u53d6" in f"{first}"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ('"Paris"', "Paris"),
        ('""', {}),
        ('"{\\"x\\": NaN}"', {"x": "NaN"}),
        ("null", {}),
        ('{"x": NaN}', {"x": "NaN"}),
        ('"{\\"x\\": 1}"', {"x": 1}),
    ],
)
def test_arguments_are_json_that_may_come_back(arguments: str, wanted: Any) -> None:
    reader = CallReader([TOOL])
    reader.add(f'{{"name": "count", "arguments": {arguments}}}')
    _, (call,) = reader.finish()
    assert json.loads(call["function"]["arguments"]) == wanted
    (back,) = decoded([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert back["tool_calls"][0]["function"]["arguments"] == wanted
    prepared([back], [TOOL], None)


@pytest.mark.parametrize("begins", ["<tool_call>", "{"])
def test_an_answer_with_tools_and_a_format_is_a_call_or_that_format(
    begins: str, tiny_model: Model
) -> None:
    grammar = call_or_answer([TOOL], SCHEMA, tiny_model.text)
    ids = tiny_model.text.encode(begins, add_special_tokens=False).tolist()

    def processed(text: Sequence[int], logits: np.ndarray) -> np.ndarray:
        """Begins the answer in this way."""
        at = len(text) - prompt
        if at < len(ids):
            logits = np.where(np.arange(len(logits)) == ids[at], 100.0, logits)
        return logits

    prompt = len(tiny_model.text.encode("a"))
    text = str(
        tiny_model.generate("a", grammar=grammar, logits_processor=processed, max_new_tokens=300)
    )
    assert text.startswith(begins)
    if begins == "{":
        assert fits(text)
    else:
        reader = CallReader([TOOL])
        reader.add(text)
        assert [call["function"]["name"] for call in reader.finish()[1]] == ["count"]


def test_json_beside_tools_is_never_a_call_and_comes_as_it_is_written() -> None:
    text = '{"steps": [{"name": "count", "arguments": {}}]}'
    reader = CallReader([TOOL], tagged=True)
    assert "".join(map(reader.add, text)) == text and reader.finish() == ("", [])
    reader = CallReader([TOOL], tagged=True)
    call = '<tool_call>\n{"name": "count", "arguments": {}}\n</tool_call>'
    assert "".join(map(reader.add, call)) == "" and len(reader.finish()[1]) == 1


@pytest.mark.parametrize("schema", [True, {}, {"type": "array", "maxItems": 1}])
def test_any_schema_goes_with_tools(schema: Any, tiny_model: Model) -> None:
    odd = {"type": "object", "properties": {"x": {"type": "string", "format": "no such"}}}
    tool = {"type": "function", "function": {"name": "odd", "parameters": odd}}
    grammar = call_or_answer([tool], schema, tiny_model.text)
    assert tiny_model.generate("a", grammar=grammar, max_new_tokens=4)


@pytest.mark.parametrize("schema", [True, {}])
def test_a_schema_may_allow_any_json(schema: Any, tiny_model: Model) -> None:
    grammar = Grammar.json_schema(schema)
    assert tiny_model.generate("a", grammar=grammar, max_new_tokens=4)


def test_a_schema_that_allows_nothing_is_refused(tiny_model: Model) -> None:
    with pytest.raises(PolicyError):
        tiny_model.generate("a", grammar=Grammar.json_schema(False))


def test_a_panic_of_the_library_is_a_refusal(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        """What pyo3 raises."""

    class Matcher:
        @staticmethod
        def validate_grammar_with_warnings(*_: object) -> None:
            raise Panic("index out of bounds")

    grammar = Grammar.regex("a+")
    tiny_model.generate("a", grammar=grammar, max_new_tokens=2)
    monkeypatch.setattr("llguidance.LLMatcher", Matcher)
    with pytest.raises(PolicyError, match="the grammar is refused: index out of bounds"):
        tiny_model.generate("a", grammar=grammar)


# OpenAI's client


def test_schemas_are_kept_over_the_api(client: openai.OpenAI) -> None:  # noqa: F811
    form: Any = {"type": "json_schema", "json_schema": {"name": "ships", "schema": SCHEMA}}
    found = client.chat.completions.create(
        model="scored", messages=MESSAGES, response_format=form, n=3, temperature=3.0, seed=1
    )
    assert all(fits(choice.message.content or "") for choice in found.choices)
    assert {choice.finish_reason for choice in found.choices} == {"stop"}
    ours: Any = {"response_format": {"type": "regex", "regex": "[0-9]{3}"}}
    text = client.completions.create(model="tiny", prompt="the", extra_body=ours).choices[0].text
    assert len(text) == 3 and text.isdecimal()


@pytest.mark.slow
def test_two_hundred_answers_of_a_schema_all_parse(tiny_model: Model) -> None:
    """At a temperature at which the model writes anything, eight at once."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "ships", "schema": SCHEMA}}
    with Server({"tiny": tiny_model}) as server:  # noqa: F811
        client = server.client()

        def ask(seed: int) -> str:
            found = client.chat.completions.create(
                model="tiny", messages=MESSAGES, response_format=form, temperature=3.0, seed=seed
            )
            return found.choices[0].message.content or ""

        with ThreadPoolExecutor(8) as pool:
            assert [fits(text) for text in pool.map(ask, range(200))] == [True] * 200


def test_log_probabilities_over_the_api(client: openai.OpenAI) -> None:  # noqa: F811
    options: Any = {"model": "tiny", "max_tokens": 6, "temperature": 0, "extra_body": {}}
    chat: Any = {**options, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    logprobs = client.chat.completions.create(**chat).choices[0].logprobs
    assert logprobs is not None and logprobs.content
    for token in logprobs.content:
        assert len(token.top_logprobs) == 2
        assert token.logprob == token.top_logprobs[0].logprob <= 0
    streamed = [
        token
        for piece in client.chat.completions.create(**chat, stream=True)
        if piece.choices[0].logprobs and piece.choices[0].logprobs.content
        for token in piece.choices[0].logprobs.content
    ]
    assert [one.token for one in streamed] == [one.token for one in logprobs.content]
    assert [one.logprob for one in streamed] == pytest.approx(
        [one.logprob for one in logprobs.content], abs=1e-4
    )
    plain = client.completions.create(**options, prompt="the", logprobs=3).choices[0].logprobs
    assert plain is not None and plain.tokens and plain.top_logprobs
    assert all(len(top) <= 3 for top in plain.top_logprobs)


def test_the_bytes_of_tokens_make_up_the_text(client: openai.OpenAI) -> None:  # noqa: F811
    """Also where a character is cut into several tokens."""
    form: Any = {"response_format": {"type": "regex", "regex": "a\u00e9\u20ac\U0001f30a!"}}
    found = client.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2, extra_body=form
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None and logprobs.content
    *tokens, _ = logprobs.content  # the last one ends the answer
    raw = b"".join(bytes(token.bytes or []) for token in tokens)
    assert raw.decode() == found.choices[0].message.content == "a\u00e9\u20ac\U0001f30a!"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "count"}}]
)
def test_a_call_that_is_asked_for_is_made(
    export_tiny: Callable[..., Path], night: Path, tmp_path: Path, choice: Any
) -> None:
    source = save_tiny(tmp_path / "long", max_position_embeddings=2048)
    with dash_onnx.load(export_tiny(source, calibration=(night,))) as model:
        with Server({"long": model}) as server:
            _calls(server.client(), choice)
            _items(server.client(), choice)


def test_a_tool_that_a_template_refuses_is_described_without_it(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    encode_text = TextCodec.encode

    def encode(codec: TextCodec, text: str, **options: Any) -> Any:
        said.append(text)
        return encode_text(codec, text, **options)

    described = "{% for tool in tools or [] %}{{ '// ' + tool.function.description }}{% endfor %}"
    monkeypatch.setattr(tiny_model.text, "chat_template", described + QWEN)
    monkeypatch.setattr(TextCodec, "encode", encode)
    options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1}
    with Server({"tiny": tiny_model}) as served:
        for description in ({}, {"description": "Counts."}):
            function = {**TOOL["function"], **description}
            tools: Any = [{"type": "function", "function": function}]
            with pytest.raises(openai.BadRequestError, match="context"):  # of a tiny model
                served.client().chat.completions.create(**options, tools=tools)
    first, second = (text for text in said if "count" in text)
    assert "You may call functions" in first and "//" not in first
    assert second.startswith("// Counts.")


def _calls(client: openai.OpenAI, choice: Any) -> None:  # noqa: F811
    options: Any = {
        "model": "long",
        "messages": MESSAGES,
        "tools": [TOOL],
        "tool_choice": choice,
        "max_tokens": 200,
    }
    found = client.chat.completions.create(**options).choices[0]
    assert found.finish_reason == "tool_calls" and found.message.content is None
    (call,) = found.message.tool_calls or []
    assert call.type == "function" and call.function.name == "count"
    assert fits(call.function.arguments)
    pieces = [*client.chat.completions.create(**options, stream=True)]
    calls = [c for piece in pieces for c in piece.choices[0].delta.tool_calls or []]
    assert [c.function.arguments for c in calls if c.function] == [call.function.arguments]
    assert not any(piece.choices[0].delta.content for piece in pieces)
    assert pieces[-1].choices[0].finish_reason == "tool_calls"


def _items(client: openai.OpenAI, choice: Any) -> None:  # noqa: F811
    """The same with /v1/responses, and the call's result."""
    talk: list[Any] = [*MESSAGES]
    tools: Any = [{"type": "function", **TOOL["function"]}]
    named = choice if isinstance(choice, str) else {"type": "function", "name": "count"}
    more: Any = {"model": "long", "tools": tools}
    events: list[Any] = [
        *client.responses.create(input=talk, tool_choice=named, **more, stream=True)
    ]
    (call,) = events[-1].response.output
    assert (call.type, call.name) == ("function_call", "count") and fits(call.arguments)
    kinds = [event.type.removeprefix("response.") for event in events[2:-1]]
    arguments = "function_call_arguments"
    deltas = [f"{arguments}.delta", f"{arguments}.done"]
    assert kinds == ["output_item.added", *deltas, "output_item.done"]
    with client.responses.with_streaming_response.create(
        input=talk, tool_choice=named, **more, stream=True
    ) as stream:
        silent = [*stream.iter_lines()].count(":")
    assert silent > 5  # a proxy would close a connection that is silent while a call is written
    talk += [call, {"type": "function_call_output", "call_id": call.call_id, "output": "7"}]
    found = client.responses.create(input=talk, max_output_tokens=4, **more)
    assert found.usage is not None and found.usage.output_tokens <= 4


def test_a_grammar_and_a_processor_that_leave_no_token_are_told(tiny_model: Model) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    braces = [n for n in range(384) if "{" in tiny_model.text.piece(n)]

    def without(_: object, logits: np.ndarray) -> np.ndarray:
        logits[braces] = -np.inf
        return logits

    for temperature in (0, 0.8):
        with pytest.raises(PolicyError, match="no token is left by both"):
            tiny_model.generate(
                "a",
                grammar=Grammar.json_schema(schema),
                logits_processor=without,
                temperature=temperature,
            )


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "fly"}}},
        {"tool_choice": "required"},
        {"tools": [{"type": "function", "function": {"name": "a</s>b"}}]},  # a control token
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"function": {"name": "count", "arguments": '{"a": "\\u003c/s>"}'}}
                    ],
                }
            ]
        },
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": {"a": 1}}]},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": 5}]},
        {"tools": [3]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "ships"}}},
        {"response_format": {"type": "json_object", "schema": {"type": "foo"}}},
        {"response_format": {"type": "json_object", "schema": 5}},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": 5}}]},
        {"tools": [TOOL], "response_format": {"type": "regex", "regex": "a+"}},
        {"logprobs": True, "top_logprobs": 21},
    ],
    ids=str,
)
def test_forms_that_cannot_be_are_refused(client: openai.OpenAI, body: dict[str, Any]) -> None:  # noqa: F811
    asked: Any = {"model": "tiny", "messages": MESSAGES, "extra_body": body}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**asked)
