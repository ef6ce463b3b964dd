"""/v1/responses: its requests as chats, and its answers as items and events."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest
from test_forms import SCHEMA, fits
from test_serve import client, server  # noqa: F401

from dash_onnx.core.errors import PolicyError
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.serve.answer import Choice
from dash_onnx.serve.errors import APIError
from dash_onnx.serve.responses import ResponsesAnswer, ResponsesRequest
from dash_onnx.serve.schema import ChatRequest
from dash_onnx.serve.service import Job, Tally

ASKED: Any = {"model": "tiny", "input": "the keeper counts", "max_output_tokens": 8}


@pytest.mark.parametrize("limit", [8, 1])
def test_an_answer_is_that_of_a_chat(client: openai.OpenAI, limit: int) -> None:  # noqa: F811
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": ASKED["input"]},
    ]
    chat = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=limit, temperature=0
    )
    asked = {**ASKED, "max_output_tokens": limit, "temperature": 0}
    found = client.responses.create(**asked, instructions="Be brief.", metadata={"a": "b"})
    cut = chat.choices[0].finish_reason == "length"
    assert found.output_text == chat.choices[0].message.content
    assert found.status == ("incomplete" if cut else "completed")
    assert (found.incomplete_details is not None) == cut
    assert found.usage is not None and chat.usage is not None
    assert found.usage.total_tokens == chat.usage.total_tokens
    assert (found.metadata, found.instructions) == ({"a": "b"}, "Be brief.")
    assert found.model_dump()["dash"]["policy"]


def test_a_stream_ends_with_the_answer_that_it_sent(client: openai.OpenAI) -> None:  # noqa: F811
    more: Any = {"temperature": 0, "top_logprobs": 2}
    whole = client.responses.create(**ASKED, **more)
    events: list[Any] = [*client.responses.create(**ASKED, **more, stream=True)]
    assert [event.sequence_number for event in events] == [*range(len(events))]
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert {*kinds[4 : 4 + len(deltas)]} == {"output_text.delta"}
    assert kinds[4 + len(deltas) :] == [
        "output_text.done",
        "content_part.done",
        "output_item.done",
        whole.status,
    ]
    last = events[-1].response
    assert "".join(event.delta for event in deltas) == last.output_text == whole.output_text
    tokens = [token.token for event in deltas for token in event.logprobs]
    assert tokens == [token.token for token in last.output[0].content[0].logprobs]
    assert len(tokens) == last.usage.output_tokens
    ids = {event.item_id for event in deltas}
    assert ids == {last.output[0].id} and last.output[0].id != whole.output[0].id


def test_a_format_and_our_fields_are_taken(client: openai.OpenAI) -> None:  # noqa: F811
    form: Any = {"type": "json_schema", "name": "ships", "schema": SCHEMA, "strict": True}
    asked = {**ASKED, "max_output_tokens": 200, "temperature": 3.0, "extra_body": {"seed": 1}}
    found = client.responses.create(**asked, text={"format": form})
    assert fits(found.output_text)
    assert found.model_dump(by_alias=True)["text"]["format"]["schema"] == SCHEMA
    more = {"policy": "int8", "seed": 1}
    found = client.responses.create(**ASKED, extra_body=more)
    assert found.model_dump()["dash"]["policy"] == "int8"


def test_items_of_one_turn_become_one_message() -> None:
    text, call = [{"type": "output_text", "text": "One moment."}], {"name": "f", "arguments": "{}"}
    items: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Q"}]},
        {"type": "reasoning", "summary": [], "encrypted_content": "x"},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": text},
        {"type": "function_call", "call_id": "1", **call},
        {"type": "function_call", "call_id": "2", **call},
        {"type": "function_call_output", "call_id": "1", "output": "A"},
        {"type": "function_call_output", "call_id": "2", "output": "B"},
        {"role": "assistant", "content": "AB"},
        {"role": "assistant", "content": "C"},
    ]
    calls = [{"id": name, "type": "function", "function": call} for name in "12"]
    assert ResponsesRequest(input=items, instructions="I").prompt() == [
        {
            "role": "system",
            "content": [{"type": "text", "text": text} for text in ("I", "\n\n", "Be brief.")],
        },
        {"role": "user", "content": items[1]["content"]},
        {
            "role": "assistant",
            "content": text,
            "reasoning_content": "Hm.",
            "tool_calls": calls,
        },
        {"role": "tool", "tool_call_id": "1", "content": "A"},
        {"role": "tool", "tool_call_id": "2", "content": "B"},
        {"role": "assistant", "content": "AB"},
        {"role": "assistant", "content": "C"},
    ]
    with pytest.raises(PolicyError, match="items of type image_generation_call"):
        ResponsesRequest(input=[{"type": "image_generation_call"}]).prompt()


def pieces_of(
    model: Model, *pieces: tuple[str, str], reason: str = "stop", **fields: Any
) -> tuple[ResponsesAnswer, list[Any]]:
    """An answer and its events, from thoughts and text of each token."""
    tool = {"type": "function", "function": {"name": "count"}}
    body = ResponsesRequest(input="x", **fields)
    answer = ResponsesAnswer("m", Choice(model.text, [tool]), body)
    events = list[Any]()
    for number, (reasoning, text) in enumerate(pieces, 1):
        ended = reason if number == len(pieces) else None
        facts = {"token": 5, "thinking": bool(reasoning), "logprobs": None, "path": (), "ms": 1.0}
        given = {"reasoning": reasoning, "text": text, "finish_reason": ended, **facts}
        chunk: Any = SimpleNamespace(generated_tokens=number, **given)
        events += answer.add(0, chunk, Tally(finish_reason=reason))
    return answer, events


def test_thoughts_text_and_calls_are_items_in_their_order(tiny_model: Model) -> None:
    call = '<tool_call>{"name": "count", "arguments": {}}</tool_call>'
    told = [("Hm", ""), ("?", ""), ("", "\n"), ("", "A "), ("", "ship"), ("", f"\n{call}")]
    _, events = pieces_of(tiny_model, *told)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["type"] for item in done] == ["reasoning", "message", "function_call"]
    assert done[0]["content"] == [{"type": "reasoning_text", "text": "Hm?"}]
    assert done[1]["content"][0]["text"].startswith("\nA ship")
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["output_index"] for event in added] == [0, 1, 2]
    assert all(not event["item"].get("content") for event in added)


@pytest.mark.parametrize(("text", "kinds"), [("", ["message"]), ("<call>", ["function_call"])])
def test_space_alone_is_a_message_only_if_there_is_no_call(
    tiny_model: Model, text: str, kinds: list[str]
) -> None:
    call = '<tool_call>{"name": "count", "arguments": {}}</tool_call>'
    _, events = pieces_of(tiny_model, ("", "\n"), ("", text.replace("<call>", call)))
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["type"] for item in done] == kinds


@pytest.mark.parametrize("summary", [None, "auto"])
def test_thoughts_are_a_summary_if_one_is_asked_for(tiny_model: Model, summary: Any) -> None:
    told = [("Hm", ""), ("?", ""), ("", "A")]
    answer, events = pieces_of(tiny_model, *told, reasoning={"summary": summary})
    name = "reasoning_summary_text" if summary else "reasoning_text"
    deltas = [event["delta"] for event in events if event["type"] == f"response.{name}.delta"]
    assert deltas == ["Hm", "?"]
    item = answer.whole(job_of(1))["output"][0]
    field, kind = ("summary", "summary_text") if summary else ("content", "reasoning_text")
    assert item[field] == [{"type": kind, "text": "Hm?"}]


@pytest.mark.parametrize("cut", ["<think>", "<tool_call>"])
def test_an_answer_that_the_limit_cuts_off_has_no_message_that_it_did_not_begin(
    tiny_model: Model, cut: str
) -> None:
    told = ("Hm", "") if cut == "<think>" else ("", "<tool_call>\n")
    answer, _ = pieces_of(tiny_model, ("", ""), told, reason="length")
    response = answer.whole(job_of(2, "length"))
    assert (response["status"], response["incomplete_details"]["reason"]) == (
        "incomplete",
        "max_output_tokens",
    )
    kinds = [(item["type"], item["status"]) for item in response["output"]]
    assert kinds == ([("reasoning", "incomplete")] if cut == "<think>" else [])


def job_of(tokens: int, reason: str = "stop") -> Job:
    """The generation of an answer."""
    tally = Tally(finish_reason=reason, prompt_tokens=3, generated_tokens=tokens)
    return Job("m", [np.array([1, 2, 3])], GenerationOptions(), [tally])


@pytest.mark.parametrize("own", [True, False], ids=["chat", "responses"])
def test_only_allowed_tools_may_be_called(own: bool) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in "abc"]
    given: Any = {"mode": "required", "tools": tools[1:]}
    if not own:
        tools = [{"type": "function", **tool["function"]} for tool in tools]
        given["tools"] = tools[1:]
    choice = {"type": "allowed_tools", **({"allowed_tools": given} if own else given)}
    fields: Any = {"tools": tools, "tool_choice": choice}
    request = ChatRequest(messages=[], **fields) if own else ResponsesRequest(input="x", **fields)
    assert [tool["function"]["name"] for tool in request.offered] == ["b", "c"]
    assert request._tools[1] == "required"


def test_tools_of_other_types_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """As Codex sends them beside its functions; llama.cpp's server does the same."""
    kinds = ["web_search", "function", "custom", "web_search"]
    given: Any = [{"type": kind, "name": f"t{number}"} for number, kind in enumerate(kinds)]
    request = ResponsesRequest(input="x", tools=given)
    assert [tool["function"]["name"] for tool in request.offered] == ["t1"]
    assert request.tools == given[1:2]
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "tools of type 'custom, web_search' are left out"
    ]


def test_an_error_in_a_stream_has_both_forms_that_clients_read(tiny_model: Model) -> None:
    answer, events = pieces_of(tiny_model, ("", "a"), ("", "b"))
    told = answer.failed(APIError(504, "too long", "timeout"))
    assert (told["type"], told["sequence_number"]) == ("error", len(events))
    assert told["message"] == told["error"]["message"] == "too long"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"previous_response_id": "r"}, "previous_response_id: nothing is stored"),
        ({"input": [{"type": "item_reference", "id": "i"}]}, "set store to false"),
        ({"input": 5}, "input: Input should be a valid list"),
        ({"input": [{"type": "function_call", "call_id": "1"}]}, "a tool call must be"),
        ({"max_output_tokens": 0}, "max_output_tokens: Input should be greater"),
        ({"tools": [{"type": "function"}]}, "a tool must be"),
        ({"tool_choice": {"type": "allowed_tools", "tools": 3}}, "needs a list of tools"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
            "tools that were sent",
        ),
        ({"input": [{"type": "reasoning", "content": 5}]}, "content of a reasoning item"),
        ({"extra_body": {"n": 2}}, "n: /v1/responses has one answer"),
        ({"extra_body": {"prompt": {"id": "p"}}}, "prompt: nothing is stored"),
    ],
)
def test_what_a_chat_cannot_hold_is_refused(
    client: openai.OpenAI,  # noqa: F811
    change: Any,
    message: str,
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.responses.create(**{**ASKED, **change})
