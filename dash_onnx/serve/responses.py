"""OpenAI's /v1/responses: a chat whose messages, calls and thoughts are items of one list.

Nothing is stored: a client sends the whole conversation, as to /v1/chat/completions.
"""

from __future__ import annotations

import itertools
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from dash_onnx.core.errors import PolicyError
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.results import Chunk
from dash_onnx.serve.answer import Answer, Choice
from dash_onnx.serve.errors import APIError
from dash_onnx.serve.schema import ChatRequest, Count, JSONObject, ResponseFormat
from dash_onnx.serve.service import Job, Tally
from dash_onnx.serve.tools import type_of

_LOG = logging.getLogger(__name__)

_LOGPROBS = "message.output_text.logprobs"  # in `include`
_STORED = ("previous_response_id", "conversation", "prompt", "background")


class _Kind(NamedTuple):
    """How an item with text is told.

    Attributes:
        prefix: of its id.
        field: of the item that has the text's part.
        event: events of the text.
        part_event: events of the part.
        part: the part, without text.
        item: other fields of the item.
    """

    prefix: str
    field: str
    event: str
    part_event: str
    part: dict[str, Any]
    item: dict[str, Any]


_MESSAGE = _Kind(
    *("msg", "content", "output_text", "content_part"),
    {"type": "output_text", "annotations": [], "logprobs": []},
    {"type": "message", "role": "assistant"},
)
_THOUGHTS = _Kind(
    *("rs", "content", "reasoning_text", "content_part"),
    {"type": "reasoning_text"},
    {"type": "reasoning", "summary": []},
)
_SUMMARY = _Kind(
    *("rs", "summary", "reasoning_summary_text", "reasoning_summary_part"),
    {"type": "summary_text"},
    {"type": "reasoning"},
)


class TextOptions(JSONObject):
    """What an answer must look like."""

    format: ResponseFormat = ResponseFormat()


class Reasoning(JSONObject):
    """How much a model thinks, and whether its thoughts are told as a summary."""

    effort: str = ""
    summary: str = ""


def _listed(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


class ResponsesRequest(ChatRequest):
    """A request to /v1/responses; other fields are as for chats."""

    input: Annotated[list[dict[str, Any]], BeforeValidator(_listed)]
    messages: list[dict[str, Any]] = Field(default_factory=list)  # made of `input`
    instructions: str = ""
    max_output_tokens: Count = None
    text: TextOptions = TextOptions()
    reasoning: Reasoning = Reasoning()
    include: list[str] = Field(default_factory=list)
    metadata: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _as_chat(self) -> ResponsesRequest:
        self.max_tokens = self.max_output_tokens or self.max_tokens
        self.reasoning_effort = self.reasoning.effort or self.reasoning_effort
        self.logprobs |= _LOGPROBS in self.include or self.top_logprobs is not None
        if "format" in self.text.model_fields_set:
            self.response_format = self.text.format
        if others := sorted({*map(type_of, self.tools)} - {"function"}):
            told = ", ".join(others)
            _LOG.warning("/v1/responses: tools of type %.100r are left out", told)
            self.tools = [tool for tool in self.tools if type_of(tool) == "function"]
        return self

    def options(self, limit: int) -> GenerationOptions:
        """See `ChatRequest`."""
        if self.n > 1:
            raise PolicyError("n: /v1/responses has one answer; use /v1/chat/completions")
        for name in _STORED:
            if (self.model_extra or {}).get(name):
                told = "nothing is stored; send the whole conversation as input"
                raise PolicyError(f"{name}: {told}")
        return super().options(limit)

    def prompt(self) -> list[dict[str, Any]]:
        """See `ChatRequest`; instructions and the system messages after them are one message."""
        told = [{"role": "system", "content": self.instructions}] if self.instructions else []
        self.messages = [*told, *_messages_of(self.input)]
        found = super().prompt()
        system = [*itertools.takewhile(lambda message: message["role"] == "system", found)]
        if not told or len(system) == 1:
            return found
        contents = (_parts(message.get("content") or "") for message in system)
        one = [part for content in contents for part in (*content, *_parts("\n\n"))][:-1]
        return [{"role": "system", "content": one}, *found[len(system) :]]

    def answer(self, name: str, choices: list[Choice]) -> Answer:
        """See `GenerationRequest`."""
        (choice,) = choices
        return ResponsesAnswer(name, choice, self)


def _parts(content: Any) -> list[Any]:
    """The content of a message as a list of parts."""
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _messages_of(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as messages: thoughts, text and calls of one turn are one message.

    Raises:
        PolicyError: an item is of a kind that a chat does not have.
    """
    found = list[dict[str, Any]]()

    def turn(*fields: str) -> dict[str, Any]:
        """The message of the present turn, or a new one if that has any of these fields."""
        if not found or found[-1]["role"] != "assistant" or any(map(found[-1].get, fields)):
            found.append({"role": "assistant", "content": ""})
        return found[-1]

    for item in items:
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") == "assistant":
            turn("content", "tool_calls")["content"] = item.get("content")
        elif kind == "message":
            found.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            if not isinstance(parts, list):
                raise PolicyError("input: the content of a reasoning item must be a list")
            thoughts = "".join(
                str(part.get("text", "")) for part in parts if isinstance(part, dict)
            )
            if thoughts:
                turn("content", "tool_calls", "reasoning_content")["reasoning_content"] = thoughts
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            turn().setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            call_id, output = item.get("call_id"), item.get("output")
            found.append({"role": "tool", "tool_call_id": call_id, "content": output})
        elif kind == "item_reference":
            told = "nothing is stored, so items cannot be named by their ids; set store to false"
            raise PolicyError(f"input: {told}")
        else:
            raise PolicyError(f"input: items of type {str(kind)[:100]} are not supported")
    return found


class ResponsesAnswer:
    """The answer to a request; see `Answer`."""

    end = ""

    def __init__(self, model: str, choice: Choice, body: ResponsesRequest):
        """Gives it an id."""
        self._choice, self._items = choice, list[dict[str, Any]]()
        self._events, self._sent = list[dict[str, Any]](), 0
        self._space = ""  # that a message may begin with
        self._logprobs = list[dict[str, Any]]()  # not sent yet
        self._thoughts = _SUMMARY if body.reasoning.summary else _THOUGHTS
        self._open: _Kind | None = None  # of the last item, if it is not complete
        shape = body.text.format
        given = shape.model_dump(exclude_unset=True, by_alias=True)
        self._response = {
            "id": _id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "error": None,
            "instructions": body.instructions or None,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "model": model,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {
                "effort": body.reasoning.effort or None,
                "summary": body.reasoning.summary or None,
            },
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": shape.type, **given}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools,
            "top_p": body.top_p,
            "truncation": "disabled",
        }

    def add(self, index: int, chunk: Chunk, tally: Tally) -> list[dict[str, Any]]:
        """See `Answer`."""
        self._events, choice = [], self._choice
        if chunk.generated_tokens == 1:
            begun = {**self._response, "status": "in_progress", "output": []}
            self._tell("response.created", response=begun)
            self._tell("response.in_progress", response=begun)
        said, reasoning, token = choice.add(chunk)
        if token is not None and not chunk.thinking:
            self._logprobs.append(token.content)
        facts = tally.facts_of(chunk)
        if reasoning:
            self._write(self._thoughts, reasoning, facts)
        said = self._space + said
        if said and (said.strip() or self._open is _MESSAGE):
            self._write(_MESSAGE, said, facts)
            said = ""
        self._space = said
        if chunk.finish_reason is not None:
            cut, told = self._was_cut(tally), any(one["type"] == "message" for one in self._items)
            if not told and not choice.calls and not cut:
                self._write(_MESSAGE, said, facts)
            self._close("incomplete" if cut else "completed")
            for call in choice.calls:
                self._call(call)
        return self._events

    def last(self, job: Job) -> list[dict[str, Any]]:
        """See `Answer`."""
        self._events, response = [], self.whole(job)
        self._tell(f"response.{response['status']}", response=response)
        return self._events

    def whole(self, job: Job) -> dict[str, Any]:
        """See `Answer`."""
        usage, cut = job.usage, self._was_cut(job.tallies[0])
        thoughts = usage.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
        return {
            **self._response,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._items,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {
                    **usage["prompt_tokens_details"],
                    "cache_write_tokens": 0,
                },
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": thoughts},
                "total_tokens": usage["total_tokens"],
            },
            "dash": job.tallies[0].facts(),
        }

    def failed(self, error: APIError) -> dict[str, Any]:
        """See `Answer`; most clients read one of the two forms."""
        told = {"code": error.code, "message": error.message, "param": error.param}
        return {"type": "error", "sequence_number": self._sent, **told, **error.body()}

    def _was_cut(self, tally: Tally) -> bool:
        return self._choice.finished(tally.finish_reason) == "length"

    def _write(self, kind: _Kind, text: str, facts: dict[str, Any]) -> None:
        """Adds text to an item, after its beginning if it is a new one."""
        if self._open is not kind:
            self._close()
            item = {"id": _id(kind.prefix), **kind.item, "status": "in_progress"}
            self._begin({**item, kind.field: []})
            self._open, part = kind, {**kind.part, "text": ""}
            self._items[-1] = {**item, kind.field: [part]}
            self._tell_of_part(f"{kind.part_event}.added", part={**part})
        part, more = self._items[-1][kind.field][0], {}
        part["text"] += text
        if kind is _MESSAGE:
            more = {"logprobs": self._logprobs}
            part["logprobs"] = [*part["logprobs"], *self._logprobs]
            self._logprobs = []
        self._tell_of_part(f"{kind.event}.delta", delta=text, dash=facts, **more)

    def _close(self, status: str = "completed") -> None:
        """Ends the last item, unless it is complete."""
        if (kind := self._open) is None:
            return
        item = self._items[-1]
        part, item["status"] = item[kind.field][0], status
        more = {"logprobs": part["logprobs"]} if kind is _MESSAGE else {}
        self._tell_of_part(f"{kind.event}.done", text=part["text"], **more)
        self._tell_of_part(f"{kind.part_event}.done", part=part)
        self._end(item)
        self._open = None

    def _call(self, call: dict[str, Any]) -> None:
        """The item of a call."""
        function, name = call["function"], _id("fc")
        item = {
            "id": name,
            "type": "function_call",
            "call_id": call["id"],
            "name": function["name"],
        }
        self._begin({**item, "arguments": "", "status": "in_progress"})
        arguments, kind = function["arguments"], "response.function_call_arguments"
        place = {"item_id": name, "output_index": len(self._items) - 1}
        self._tell(f"{kind}.delta", delta=arguments, **place)
        self._tell(f"{kind}.done", arguments=arguments, name=function["name"], **place)
        self._items[-1] = {**item, "arguments": arguments, "status": "completed"}
        self._end(self._items[-1])

    def _begin(self, item: dict[str, Any]) -> None:
        self._items.append(item)
        self._tell("response.output_item.added", item=item, output_index=len(self._items) - 1)

    def _end(self, item: dict[str, Any]) -> None:
        self._tell("response.output_item.done", item=item, output_index=len(self._items) - 1)

    def _tell_of_part(self, kind: str, **fields: Any) -> None:
        """An event of the only part of the last item."""
        assert self._open is not None
        index = {f"{self._open.field}_index": 0}
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        self._tell(f"response.{kind}", **place, **index, **fields)

    def _tell(self, kind: str, **fields: Any) -> None:
        self._events.append({"type": kind, "sequence_number": self._sent, **fields})
        self._sent += 1


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
