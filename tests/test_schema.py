"""Fields of requests and answers as OpenAI's clients, and those of other servers, write them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import llguidance
import openai
import pytest
from test_forms import SCHEMA, fits
from test_serve import MESSAGES, Server, client, metric, server  # noqa: F401

from dash_onnx.runtime.grammar import Constraint, Grammar, guidance_tokenizer
from dash_onnx.runtime.model import Model
from dash_onnx.serve.answer import Choice
from dash_onnx.serve.schema import ChatRequest

# Response formats


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_object", "schema": SCHEMA},
        {"type": "json_schema", "schema": SCHEMA},
        {"type": "json_schema", "schema": SCHEMA, "json_schema": {"name": "ships", "schema": None}},
    ],
    ids=["object", "schema", "null"],
)
def test_a_schema_may_be_given_as_with_llama_cpp(client: openai.OpenAI, form: Any) -> None:  # noqa: F811
    found = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format=form, temperature=3.0, seed=1
    )
    assert fits(found.choices[0].message.content or "")


@pytest.mark.parametrize(
    "field",
    "json_schema guided_json guided_regex guided_grammar guided_choice structured_outputs".split(),
)
def test_another_name_of_a_form_is_refused_and_the_field_for_it_named(
    client: openai.OpenAI,  # noqa: F811
    field: str,
) -> None:
    given: Any = {"model": "tiny", "prompt": "the", "extra_body": {field: ["yes", "no"]}}
    with pytest.raises(
        openai.BadRequestError, match=f"{field}: not supported; use response_format"
    ):
        client.completions.create(**given)


def test_fields_that_ask_for_nothing_are_taken(client: openai.OpenAI) -> None:  # noqa: F811
    more = {"best_of": 1, "modalities": ["text"], "repeat_penalty": 1.0, "top_k": -1}
    found = client.completions.create(
        model="tiny", prompt=["the keeper"], max_tokens=4, top_p=0, extra_body=more
    )
    assert found.usage is not None and found.usage.completion_tokens == 4
    assert ChatRequest(messages=[], max_tokens=-1).max_tokens is None
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt=[])
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model="tiny", prompt="a", best_of=2)


@pytest.mark.parametrize("stream", [False, True])
def test_several_texts_are_continued_in_one_request(client: openai.OpenAI, stream: bool) -> None:  # noqa: F811
    prompts, more = ["the keeper", "ships that pass", "a"], {"temperature": 0.9, "seed": 3, "n": 2}
    asked: Any = {"model": "tiny", "max_tokens": 5, **more}
    alone = [client.completions.create(prompt=prompt, **asked) for prompt in prompts]
    wanted = [choice.text for one in alone for choice in one.choices]
    counts = [one.usage for one in alone]
    if stream:
        usage: Any = {"stream_options": {"include_usage": True}}
        pieces: Any = [*client.completions.create(prompt=prompts, **asked, **usage, stream=True)]
        texts = [""] * 6
        for piece in pieces[:-1]:
            texts[piece.choices[0].index] += piece.choices[0].text
        found = pieces[-1].usage
    else:
        whole: Any = client.completions.create(prompt=prompts, **asked)
        assert [choice.index for choice in whole.choices] == [*range(6)]
        texts, found = [choice.text for choice in whole.choices], whole.usage
    assert texts == wanted
    assert found.prompt_tokens == sum(one.prompt_tokens for one in counts if one)
    assert found.completion_tokens == sum(one.completion_tokens for one in counts if one)


def ended(
    model: Model, text: str, reason: str = "length", most: int | None = None
) -> tuple[str, int, str]:
    """The text of an answer, the number of its calls, and the reason that a client gets."""
    tools = [{"type": "function", "function": {"name": "count"}}]
    choice = Choice(model.text, tools, most)
    facts = {"token": 5, "thinking": False, "reasoning": "", "logprobs": None}
    last: Any = SimpleNamespace(text=text, finish_reason=reason, **facts)
    choice.add(last)
    return choice.text, len(choice.calls), choice.finished("stop" if reason == "stop" else "length")


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_is_too_long_is_refused_before_the_others_run(
    client: openai.OpenAI,  # noqa: F811
    stream: bool,
) -> None:
    asked: Any = {"model": "tiny", "prompt": ["a", "ships " * 300], "max_tokens": 4}
    with pytest.raises(openai.BadRequestError, match="prompt 1: this model's maximum context"):
        client.completions.create(**asked, stream=stream)


def test_each_of_several_texts_runs_once(client: openai.OpenAI, server: Server) -> None:  # noqa: F811
    texts = ["the keeper counts the ships " * 9, "at night nobody passes here " * 9]
    before = metric(server, "dash_prompt_tokens_reused")
    asked: Any = {"model": "tiny", "max_tokens": 3, "n": 3}
    found = client.completions.create(prompt=texts, **asked)
    assert found.usage is not None
    reused = metric(server, "dash_prompt_tokens_reused") - before
    assert reused > 0.9 * 2 * found.usage.prompt_tokens


@pytest.mark.parametrize("reason", ["length", "context"])
@pytest.mark.parametrize(
    ("whole", "cut"),
    [
        ('<tool_call>{"name": "count", "arguments": {}}</tool_call>', '<tool_call>{"name": "cou'),
        ("", "<tool_call>\n<function=count>\n<parameter=x>\n1"),  # Qwen3-Coder
        ("", "<tool_call>count\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n"),  # GLM
        ("<|tool_call_start|>[count(a=1), ", "count(b="),  # LFM2
        ("<|tool_call_start|>[count(a=1), ", "cou"),
        ("<|tool_call_start|>[count(a=1), ", 'count(b={"name": "Ann"}, c="lo'),
        (
            '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "count", "parameters": {}}, ',
            '{"tool_call_id": "1", "tool_na',  # Command R7B
        ),
    ],
)
def test_a_call_that_the_limit_cuts_off_is_neither_text_nor_hidden(
    tiny_model: Model, whole: str, cut: str, reason: str
) -> None:
    text, calls, told = ended(tiny_model, f"Two [: {whole}{cut}", reason)
    assert (text.strip(), calls, told) == ("Two [:", bool(whole), "length")


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "unknown"}</tool_call> and more [',
        "a < b [",
        'A "<tool_call>" and its "</tool_call>" are tags, <',
        '{"name": "Ann", "age": 4',
        '{"na',
        '<tool_call>{"name": "count", "arguments": {}}</tool_call>{"ships": 3} is what I expect',
        '<function name="area"><arg/></function> is XML, which has no',
    ],
)
def test_text_that_the_limit_cuts_off_is_kept(tiny_model: Model, text: str) -> None:
    said = text.rpartition("{}}</tool_call>")[2]
    assert ended(tiny_model, text)[0] == said


@pytest.mark.parametrize(
    "rest",
    [
        '[{"name": "count',
        '{"type": "function", "name": "',
        '{"name": "',
        '{"name": "cou',
        '{"name": "count", "argu',
    ],
)
@pytest.mark.parametrize("called", [0, 1, 2])
def test_a_call_without_tags_that_the_limit_cuts_off_is_no_text(
    tiny_model: Model, called: int, rest: str
) -> None:
    text = '{"name": "count", "arguments": {}};\n' * called + rest
    assert ended(tiny_model, text) == ("", called, "length")


def test_a_closing_tag_that_the_limit_cuts_off_is_no_text(tiny_model: Model) -> None:
    text = '<tool_call>\n{"name": "count", "arguments": {}}\n</tool_c'
    assert ended(tiny_model, text) == ("", 1, "tool_calls")


def test_a_call_more_than_asked_for_may_be_cut_off(tiny_model: Model) -> None:
    call = '<tool_call>{"name": "count", "arguments": {}}</tool_call>'
    assert ended(tiny_model, call + call[:20], most=1) == ("", 1, "tool_calls")


def test_only_one_call_is_returned_where_one_is_asked_for(tiny_model: Model) -> None:
    text = '<tool_call>{"name": "count", "arguments": {}}</tool_call>' * 2
    for most in (None, 1):
        assert ended(tiny_model, text, "stop", most) == ("", most or 2, "tool_calls")


# Log probabilities


@pytest.mark.parametrize("stop", [[], ["Xa", "\u20ac\u20ac", "no such"]], ids=["", "stop"])
def test_offsets_say_where_a_token_begins(client: openai.OpenAI, stop: list[str]) -> None:  # noqa: F811
    """Also while text is held back, and where a character is cut into several tokens."""
    text = "the keeper X a\u00e9\u20ac\U0001f30a! no such"
    options: Any = {"model": "tiny", "prompt": "the", "max_tokens": 60, "logprobs": 0, "stop": stop}
    options["extra_body"] = {"response_format": {"type": "regex", "regex": text}}
    whole = client.completions.create(**options).choices[0]
    logprobs = whole.logprobs
    assert whole.text == text.removesuffix("no such" if stop else "") and logprobs is not None
    tokens, offsets = logprobs.tokens or [], logprobs.text_offset or []
    assert offsets[0] == 0 and offsets == sorted(offsets)
    for token, offset in zip(tokens, offsets, strict=True):
        assert "\ufffd" in token or token == "</s>" or text[offset:].startswith(token)
    pieces = [
        piece.choices[0].logprobs for piece in client.completions.create(**options, stream=True)
    ]
    streamed = [one for piece in pieces if piece for one in piece.text_offset or []]
    assert streamed == offsets


# Earlier messages

# As Llama 3 renders an answer.
LLAMA = (
    "{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize("calls", [None, []])
def test_an_earlier_answer_without_calls_may_say_so(
    calls: Any,
    client: openai.OpenAI,  # noqa: F811
    tiny_model: Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiny_model.text, "chat_template", LLAMA)
    answer = {"role": "assistant", "content": "hi", "tool_calls": calls, "function_call": None}
    given: Any = [*MESSAGES, answer, *MESSAGES]
    found = client.chat.completions.create(model="tiny", messages=given, max_tokens=1)
    assert found.usage is not None
    text = "".join(message["content"] for message in given)
    assert found.usage.prompt_tokens == len(tiny_model.text.encode(text, add_special_tokens=False))


def test_fields_of_a_message_that_hold_nothing_are_left_out() -> None:
    answer = {"role": "assistant", "content": None, "tool_calls": None, "audio": None, "name": "a"}
    (found,) = ChatRequest(messages=[answer]).prompt()
    assert found == {"role": "assistant", "content": None, "name": "a"}


# What a grammar can hold


PROPERTIES = {"name": {"type": "string"}, "age": {"type": "integer"}}


@pytest.mark.parametrize(
    ("schema", "fitting", "other"),
    [
        ({"properties": PROPERTIES}, '{"name": "a", "age": 3}', '{"name": "a", "size": 3}'),
        ({"properties": PROPERTIES}, '{"name": "a"}', '{"name":"a"}'),  # as models write it
        ({"properties": {}}, "{}", '{"name": "a"}'),
        ({"properties": {"pattern": {"type": "string"}}}, '{"pattern": "("}', '{"pattern": 3}'),
        ({"properties": {"properties": PROPERTIES["age"]}}, '{"properties": 3}', '{"a": 3}'),
        ({"properties": {"x": {"properties": {}}}}, '{"x": {}}', '{"x": {"y": 1}}'),
        ({"$defs": {"x": {"properties": {}}}, "$ref": "#/$defs/x"}, "{}", '{"y": 1}'),
        (
            {"properties": PROPERTIES, "additionalProperties": {"type": "string"}},
            '{"name": "a", "size": "b"}',
            '{"name": "a", "size": 3}',
        ),
        ({"properties": {}, "patternProperties": {"^a": {}}}, '{"ab": 1}', '{"b": 1}'),
        (
            {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}], "type": "object"},
            '{"a": 1, "b": 2}',
            "[]",
        ),
        (
            {"properties": {"a": {}}, "anyOf": [{"required": ["b"]}, {"required": ["a"]}]},
            '{"a": 1, "b": 2}',
            '{"a": 1',
        ),
        (
            {"properties": PROPERTIES, "required": ["name", "size"], "type": "object"},
            '{"name": "a", "size": "b"}',
            '{"name": "a"}',
        ),
        (
            {"properties": {"a": {"properties": {}, "allOf": [{}, {}]}, "b": {"properties": {}}}},
            '{"a": {"c": 1}, "b": {"c": 1}}',
            '{"a": 1',
        ),
        (
            {
                "properties": {"a": {"allOf": [{"$ref": "#/$defs/x"}]}},
                "$defs": {"x": {"enum": [1]}},
            },
            '{"a": 1}',
            '{"a": 1, "b": 1}',
        ),
        ({"type": "string", "pattern": "^[a-z]+$"}, '"ab"', '"AB"'),
        (
            {
                "allOf": [{"$ref": "#/$defs/x"}],
                "oneOf": [{"$ref": "#/$defs/y"}, {"type": "object", "required": ["c"]}],
                "$defs": {
                    "x": {"type": "object", "properties": {"a": {}}, "required": ["a"]},
                    "y": {"type": "object", "properties": {"b": {}}, "required": ["b"]},
                },
            },
            '{"a": 1, "b": 2}',
            '{"a": 1}',
        ),
        (
            {"type": "object", "required": ["a"], "anyOf": [{"properties": {"b": {}}}]},
            '{"b": 2, "a": 1}',
            '{"b": 2}',
        ),
        ({"oneOf": [{"type": "integer"}, {"properties": PROPERTIES}]}, '{"age": 1}', '{"b": 1}'),
        (
            {
                "type": "object",
                "additionalProperties": True,
                "anyOf": [{"properties": {"a": {}}, "required": ["a"]}, {"required": ["b"]}],
            },
            '{"a": 1, "c": 2}',
            "[]",
        ),
        (
            {"properties": PROPERTIES, "unevaluatedProperties": {}},
            '{"age": 1, "b": 1}',
            '{"age": "b"}',
        ),
        (
            {"properties": PROPERTIES, "unevaluatedProperties": False},
            '{"age": 1}',
            '{"age": 1, "b": 1}',
        ),
        ({"const": {"properties": {}}}, '{"properties": {}}', '{"properties": {"a": 1}}'),
    ],
    ids=str,
)
def test_objects_have_the_properties_that_are_listed(
    tiny_model: Model, schema: dict[str, Any], fitting: str, other: str
) -> None:
    if "properties" in schema and "anyOf" not in schema:
        schema = {"type": "object", **schema}
    if "patternProperties" in schema:
        schema["additionalProperties"] = False
    assert accepts(tiny_model, schema, fitting)
    assert not accepts(tiny_model, schema, other)


@pytest.mark.parametrize(
    ("schema", "warning"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "propertyNames": {"enum": ["a"]}}, "propertyNames"),
        ({"type": "string", "format": "path"}, "path"),
        ({"type": "string", "pattern": "^(?!a)b$"}, "pattern"),
        (
            {
                "type": "object",
                "patternProperties": {"^(?!a)b$": {}, "^c": {}},
                "additionalProperties": False,
            },
            "pattern",
        ),
        ({"not": {"type": "string"}}, "not"),
    ],
    ids=str,
)
def test_what_a_grammar_cannot_hold_is_left_out_with_a_warning(
    tiny_model: Model, schema: dict[str, Any], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = {"array": "[1, 1]", "object": '{"b": 1}'}.get(schema.get("type", ""), '"ab"')
    for _ in range(2):
        caplog.clear()
        assert accepts(tiny_model, schema, text)
        assert warning in caplog.text


def accepts(model: Model, schema: dict[str, Any], text: str) -> bool:
    """Whether an answer may be this text."""
    tokenizer = guidance_tokenizer(model.text, model.text.tokenizer.get_vocab_size())
    matcher = llguidance.LLMatcher(tokenizer, Grammar.json_schema(schema).source)
    Constraint(Grammar.json_schema(schema), tokenizer)  # warns
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def test_a_required_call_wins_over_a_response_format(tiny_model: Model) -> None:
    request = ChatRequest(
        messages=MESSAGES,
        tools=[{"type": "function", "function": {"name": "count"}}],
        tool_choice="required",
        response_format={"type": "json_object"},
        stop=["\n"],
    )
    options = request.with_call(request.options(40), tiny_model.text)
    grammar = options.grammar
    assert options.stop == ()  # which would cut the call
    assert grammar is not None
    tokenizer = guidance_tokenizer(tiny_model.text, tiny_model.text.tokenizer.get_vocab_size())
    for text, takes in (('{"name": "count", "arguments": {}}', True), ("{}", False)):
        matcher = llguidance.LLMatcher(tokenizer, grammar.source)
        tokens = tokenizer.tokenize_str(f"<tool_call>\n{text}\n</tool_call>")
        assert (matcher.try_consume_tokens(tokens) == len(tokens)) == takes
