"""Requests and answers of OpenAI's API, as far as supported, and our additional fields."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dash_onnx.core.errors import PolicyError
from dash_onnx.core.text import Detokenizer, TextCodec
from dash_onnx.runtime.grammar import Grammar
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.results import Chunk
from dash_onnx.serve.tools import CallReader, checked_tools, forced_call, open_tokens

_ROLES = ("system", "developer", "user", "assistant", "tool")
_INSTEAD = {
    "": "logit_bias audio modalities echo suffix best_of",
    "tools": "functions",
    "repetition_penalty": "frequency_penalty presence_penalty repeat_penalty",
    "response_format": "grammar json_schema guided_json guided_regex guided_grammar guided_choice "
    "structured_outputs",
}
REFUSED = {name: instead for instead, names in _INSTEAD.items() for name in names.split()}
"""Unsupported fields that would change the answer, refused rather than ignored, with those to use
instead."""

_OPTIONS = {one.name for one in dataclasses.fields(GenerationOptions)}
_SEEDS = 2**63
_STOPS, _STOP_LENGTH = 16, 1000  # each token of an answer is searched for all stop strings


class _Object(BaseModel):
    """A JSON object in which null means that a field is absent, as clients write it."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(_Object):
    """Options of a streamed answer."""

    include_usage: bool = False


class ResponseFormat(_Object):
    """What an answer must look like; `regex` and `lark` are ours, `schema` is llama.cpp's."""

    type: Literal["text", "json_object", "json_schema", "regex", "lark"] = "text"
    json_schema: dict[str, Any] = {}
    bare_schema: Any = Field(default=None, alias="schema")
    regex: str = ""
    lark: str = ""

    def form(self) -> Grammar | None:
        """The grammar of this format.

        Raises:
            PolicyError: llguidance is missing, or rejects the format; or there is no schema.
        """
        if self.type in ("json_schema", "json_object"):
            schema = self.json_schema.get("schema")
            schema = self.bare_schema if schema is None else schema
            if self.type == "json_object":
                schema = schema or {"type": "object"}
            elif schema is None:
                raise PolicyError("a response_format of type json_schema needs json_schema.schema")
            return Grammar.json_schema(schema)
        if self.type == "regex":
            return Grammar.regex(self.regex)
        return Grammar.lark(self.lark) if self.type == "lark" else None


class TextPart(_Object):
    """A piece of text."""

    type: Literal["text"] = "text"
    text: str


class Prediction(_Object):
    """Text that the answer is likely to contain."""

    type: Literal["content"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The whole text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class GenerationRequest(_Object):
    """Fields of both kinds of requests; unlike in OpenAI's server, unknown fields are ignored."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=8)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] = []
    seed: int | None = None
    response_format: ResponseFormat = ResponseFormat()
    prediction: Prediction | None = None
    # Ours.
    policy: str = ""
    budget: float | str | None = None
    speculate: bool | int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def options(self, limit: int) -> GenerationOptions:
        """The options of the generation.

        Args:
            limit: limit on the tokens of an answer.

        Raises:
            PolicyError: a field asks for something unsupported, or is out of range.
        """
        unserved = [
            f"{name} (use {instead})" if instead else name
            for name, instead in REFUSED.items()
            if getattr(self, name, None)
        ]
        if "@" in self.policy:  # on the command line, this is a file
            raise PolicyError("a request cannot name a file: write out the policy's path")
        if unserved:
            raise PolicyError(f"{', '.join(unserved)}: not supported; leave it out")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stop) > _STOPS or any(len(word) > _STOP_LENGTH for word in stop):
            raise PolicyError(f"stop: at most {_STOPS} strings of {_STOP_LENGTH:,} characters")
        wanted = self.max_completion_tokens or self.max_tokens or limit
        same = GenerationRequest.model_fields.keys() & _OPTIONS
        given = {name: getattr(self, name) for name in same}
        if self.seed is not None:
            given["seed"] = self.seed % _SEEDS
        return GenerationOptions(
            **given,
            expected=self.prediction.text if self.prediction else "",
            max_new_tokens=min(wanted, limit),
            grammar=self.response_format.form(),
            logprobs=self.wanted_logprobs,
        )

    @property
    def wanted_logprobs(self) -> int | None:
        """Number of most likely tokens reported per token; None reports no log probabilities."""
        return None


class ChatRequest(GenerationRequest):
    """A request to /v1/chat/completions."""

    messages: list[dict[str, Any]]
    tools: list[Any] = []
    tool_choice: str | dict[str, Any] | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    reasoning_effort: str = ""
    # Ours, and those of vLLM and llama.cpp.
    max_thinking_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] = {}

    def options(self, limit: int) -> GenerationOptions:
        """As for any request; an effort of `none` disables reasoning, others go to the template."""
        most, given = self.max_thinking_tokens, self.chat_template_kwargs
        if self.reasoning_effort == "none":
            most = 0
        elif self.reasoning_effort:
            given = {"reasoning_effort": self.reasoning_effort, **given}
        return dataclasses.replace(
            super().options(limit), max_thinking_tokens=most, chat_template_kwargs=given
        )

    @property
    def wanted_logprobs(self) -> int | None:
        """See `GenerationRequest`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def with_call(self, options: GenerationOptions, codec: TextCodec) -> GenerationOptions:
        """Makes a requested call the grammar of the answer.

        Args:
            options: options of the request.
            codec: codec of the model.

        Raises:
            PolicyError: the answer already has a response format, or there is no such tool.
        """
        call = forced_call(self.offered, self.tool_choice, codec)
        if call is not None and options.grammar is not None:
            raise PolicyError(
                "a request can have a forced tool call or a response_format, not both"
            )
        return options if call is None else dataclasses.replace(options, grammar=call)

    @property
    def offered(self) -> list[dict[str, Any]]:
        """Tools that may be called.

        Raises:
            PolicyError: a tool is not a function.
        """
        return [] if self.tool_choice == "none" else checked_tools(self.tools)

    def prompt(self) -> list[dict[str, Any]]:
        """The messages, with roles that templates know, and without fields that hold nothing.

        Raises:
            PolicyError: a role is not one of OpenAI's.
        """
        found = []
        for message in self.messages:
            role = message.get("role")
            if role not in _ROLES:
                raise PolicyError(f"the role of a message must be one of {', '.join(_ROLES)}")
            held = {k: v for k, v in message.items() if k == "content" or v not in (None, [])}
            found.append({**held, "role": "system" if role == "developer" else role})
        return found


class CompletionRequest(GenerationRequest):
    """A request to /v1/completions: text to continue."""

    prompt: str
    logprobs: int | None = Field(default=None, ge=0, le=5)

    @property
    def wanted_logprobs(self) -> int | None:
        """See `GenerationRequest`."""
        return self.logprobs


class TokenLogprobs(NamedTuple):
    """Log probabilities at one token of an answer.

    Attributes:
        content: as an element of a chat answer's `logprobs.content`.
        offset: where the token's text begins in the answer's.
    """

    content: dict[str, Any]
    offset: int


class Choice:
    """One text of an answer, as it comes."""

    def __init__(self, codec: TextCodec, tools: list[dict[str, Any]]):
        """Starts an empty text.

        Args:
            codec: codec of the model.
            tools: tools whose calls are detected.
        """
        self._codec, self._reader, self._opens = codec, CallReader(tools), open_tokens(codec)
        self._detokenizer, self._offset = Detokenizer(codec), 0
        self.text, self.reasoning = "", ""
        self.calls: list[dict[str, Any]] = []
        self.tokens: list[TokenLogprobs] = []

    def add(self, chunk: Chunk) -> tuple[str, TokenLogprobs | None]:
        """Adds a chunk; returns the text that is now certain, and the token's log probabilities."""
        opens = chunk.token in self._opens and not chunk.thinking
        said = self._reader.add(chunk.text, opens=opens)
        if chunk.finish_reason is not None:
            rest, self.calls = self._reader.finish()
            said += rest
        self.text += said
        self.reasoning += chunk.reasoning
        token = None
        if chunk.logprobs is not None:
            own, top = chunk.logprobs
            content = self._entry(chunk.token, own)
            content["top_logprobs"] = [self._entry(*one) for one in top]
            token = TokenLogprobs(content, self._offset)
            self.tokens.append(token)
            self._offset += len(self._detokenizer.add(chunk.token))
        return said, token

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self._codec.piece(token), self._codec.piece_bytes(token)
        return {"token": text, "logprob": logprob, "bytes": [*raw]}


class Answer:
    """The JSON of one answer, whole or streamed in pieces."""

    def __init__(self, model: str, *, chat: bool):
        """Gives it an id."""
        self._chat = chat
        kind = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}
        self._kind = kind

    def whole(self, choices: list[Choice], reasons: list[str], **more: Any) -> dict[str, Any]:
        """The whole answer with all choices."""
        found = [
            {
                "index": index,
                "finish_reason": "tool_calls" if choice.calls else reason,
                "logprobs": self._logprobs(choice.tokens),
                **self._content(choice),
            }
            for index, (choice, reason) in enumerate(zip(choices, reasons, strict=True))
        ]
        return {**self._head, "object": self._kind, "choices": found, **more}

    def piece(
        self,
        index: int,
        text: str | None,
        reason: str | None = None,
        token: TokenLogprobs | None = None,
        calls: Sequence[dict[str, Any]] = (),
        reasoning: str = "",
        **more: Any,
    ) -> dict[str, Any]:
        """A piece of a choice.

        Args:
            index: index of the choice.
            text: text of the piece; None begins the choice.
            reason: finish reason; ends the choice.
            token: log probabilities of the piece.
            calls: tool calls.
            reasoning: reasoning text.
            more: additional fields of the answer.
        """
        kind = "chat.completion.chunk" if self._chat else self._kind
        logprobs = self._logprobs([token] if token else [])
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": logprobs}
        if not self._chat:
            choice["text"] = text or ""
        elif text is None:
            choice["delta"] = {"role": "assistant", "content": ""}
        else:
            choice["delta"] = {"content": text} if text else {}
            if reasoning:
                choice["delta"]["reasoning_content"] = reasoning
            if calls:
                numbered = [{"index": number, **call} for number, call in enumerate(calls)]
                choice["delta"]["tool_calls"] = numbered
        return {**self._head, "object": kind, "choices": [choice], **more}

    def _logprobs(self, tokens: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not tokens:
            return None
        content = [token.content for token in tokens]
        if self._chat:
            return {"content": content, "refusal": None}
        return {
            "tokens": [token["token"] for token in content],
            "token_logprobs": [token["logprob"] for token in content],
            "top_logprobs": [
                {one["token"]: one["logprob"] for one in token["top_logprobs"]} for token in content
            ],
            "text_offset": [token.offset for token in tokens],
        }

    def usage(self, counts: dict[str, Any]) -> dict[str, Any]:
        """The last piece of a stream that asked for it."""
        kind = "chat.completion.chunk" if self._chat else self._kind
        return {**self._head, "object": kind, "choices": [], "usage": counts}

    def _content(self, choice: Choice) -> dict[str, Any]:
        if not self._chat:
            return {"text": choice.text}
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if choice.calls:
            message |= {
                "content": choice.text if choice.text.strip() else None,
                "tool_calls": choice.calls,
            }
        return {"message": message}
