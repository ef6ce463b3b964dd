"""Fields of requests and answers as OpenAI's clients, and those of other servers, write them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import openai
import pytest
from test_forms import SCHEMA, fits
from test_serve import MESSAGES, client, scored, server  # noqa: F401

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
        client.completions.create(model="tiny", prompt=["a", "b"])
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model="tiny", prompt="a", best_of=2)


def test_only_one_call_is_returned_where_one_is_asked_for(tiny_model: Model) -> None:
    tool = {"type": "function", "function": {"name": "count"}}
    text = '<tool_call>{"name": "count", "arguments": {}}</tool_call>' * 2
    for most in (None, 1):
        choice = Choice(tiny_model.text, [tool], most)
        facts = {"token": 5, "thinking": False, "reasoning": "", "logprobs": None}
        last: Any = SimpleNamespace(text=text, finish_reason="stop", **facts)
        choice.add(last)
        assert len(choice.calls) == (most or 2)


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
