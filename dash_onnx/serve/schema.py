"""Requests of OpenAI's API, as far as supported, and our additional fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dash_onnx.core.arrays import Logits
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.text import TextCodec
from dash_onnx.runtime.grammar import Grammar
from dash_onnx.runtime.options import GenerationOptions, LogitsProcessor
from dash_onnx.serve.answer import Answer, Choice, Completions
from dash_onnx.serve.calls import SPECIAL
from dash_onnx.serve.tools import allowed_tools, call_or_answer, checked_tools, forced_call

_ROLES = ("system", "developer", "user", "assistant", "tool")
_INSTEAD = {
    "": "audio modalities echo suffix best_of ignore_eos min_tokens stop_token_ids",
    "tools": "functions",
    "max_tokens": "max_new_tokens n_predict num_predict",
    "prediction": "expected",
    "repetition_penalty": "repeat_penalty",
    "chat_template_kwargs": "enable_thinking",
    "max_thinking_tokens": "thinking_budget",
    "response_format": "grammar json_schema guided_json guided_regex guided_grammar guided_choice "
    "structured_outputs",
}
REFUSED = {name: instead for instead, names in _INSTEAD.items() for name in names.split()}
"""Unsupported fields that would change the answer, refused rather than ignored, with those to use
instead."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (0, 1),
    "enable_thinking": (),
    "modalities": ([], ["text"]),
    "n_predict": (-1,),
    "num_predict": (-1,),
    "repeat_penalty": (0, 1),
    "thinking_budget": (-1,),
}
"""Values of these fields that ask for nothing; of the others, what is empty or zero."""

_OPTIONS = {one.name for one in dataclasses.fields(GenerationOptions)}
_SEEDS = 2**63
MOST_PROMPTS = 32
"""Most texts of a request."""

_STOPS, _STOP_LENGTH = 16, 1000  # each token of an answer is searched for all stop strings


_NONE = BeforeValidator(lambda n: None if n == -1 else n)  # as in llama.cpp
Count = Annotated[Annotated[int, Field(ge=1)] | None, _NONE]
"""A number of tokens; -1 sets no limit."""
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
"""What is added to a logit."""


class JSONObject(BaseModel):
    """A JSON object in which null means that a field is absent, as clients write it."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(JSONObject):
    """Options of a streamed answer."""

    include_usage: bool = False


class ResponseFormat(JSONObject):
    """What an answer must look like; `regex` and `lark` are ours, `schema` is llama.cpp's."""

    model_config = ConfigDict(extra="allow")

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
            return Grammar.json_schema(self.schema_of_answer())
        if self.type == "regex":
            return Grammar.regex(self.regex)
        return Grammar.lark(self.lark) if self.type == "lark" else None

    def schema_of_answer(self) -> Any:
        """The JSON schema of an answer; None if it need not be JSON.

        Raises:
            PolicyError: there is no schema.
        """
        if self.type not in ("json_schema", "json_object"):
            return None
        schema = self.json_schema.get("schema")
        schema = self.bare_schema if schema is None else schema
        if self.type == "json_object":
            return schema or {"type": "object"}
        if schema is None:
            raise PolicyError("a response_format of type json_schema needs json_schema.schema")
        return schema


class TextPart(JSONObject):
    """A piece of text."""

    type: Literal["text"] = "text"
    text: str


class Prediction(JSONObject):
    """Text that the answer is likely to contain."""

    type: Literal["content"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The whole text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


def _biased(bias: Mapping[int, float]) -> LogitsProcessor:
    """Adds to the logits of some tokens, by their ids."""
    ids, added, last = np.array([*bias]), np.array([*bias.values()]), max(bias)

    def processor(_: Sequence[int], logits: Logits) -> Logits:
        if last >= len(logits):
            raise PolicyError(f"logit_bias: no token has the id {last}")
        logits = logits.copy()
        logits[ids] += added
        return logits

    return processor


class GenerationRequest(JSONObject):
    """Fields of both kinds of requests; unlike in OpenAI's server, unknown fields are ignored."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=8)
    max_tokens: Count = None
    max_completion_tokens: Count = None
    temperature: float | None = None
    top_p: Annotated[float | None, BeforeValidator(lambda p: 1e-6 if p == 0 else p)] = None
    stop: str | list[str] = []
    seed: Annotated[int | None, _NONE] = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Annotated[dict[TokenId, Bias], BeforeValidator(lambda b: b or {})] = {}
    response_format: ResponseFormat = ResponseFormat()
    prediction: Prediction | None = None
    # Ours.
    policy: str = ""
    budget: float | str | None = None
    speculate: bool | int | None = None
    top_k: Annotated[int | None, BeforeValidator(lambda k: 0 if k == -1 else k)] = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def options(self, limit: int) -> GenerationOptions:
        """The options of the generation.

        Args:
            limit: limit on the tokens of an answer.

        Raises:
            PolicyError: a field asks for something unsupported, or is out of range.
        """
        limited = self.max_tokens or self.max_completion_tokens
        unserved = [
            f"{name}: not supported; {f'use {instead}' if instead else 'leave it out'}"
            for name, instead in REFUSED.items()
            if not (limited and instead == "max_tokens")  # some clients send all names at once
            and getattr(self, name, None) not in (None, *_NEUTRAL.get(name, (0, False, "", [], {})))
        ]
        if "@" in self.policy:  # on the command line, this is a file
            raise PolicyError("a request cannot name a file: write out the policy's path")
        if unserved:
            raise PolicyError(", ".join(unserved))
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
            logits_processor=_biased(self.logit_bias) if self.logit_bias else None,
        )

    def answer(self, name: str, choices: list[Choice]) -> Answer:
        """An empty answer, whose choices take the text of the named model."""
        usage = bool(self.stream_options and self.stream_options.include_usage)
        return Completions(name, choices, chat=isinstance(self, ChatRequest), usage=usage)


class ChatRequest(GenerationRequest):
    """A request to /v1/chat/completions."""

    messages: list[dict[str, Any]]
    tools: list[Any] = []
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
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
            super().options(limit),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            max_thinking_tokens=most,
            chat_template_kwargs=given,
        )

    def with_call(self, options: GenerationOptions, codec: TextCodec) -> GenerationOptions:
        """Makes a required call the grammar of the answer, or allows one beside its format.

        Args:
            options: options of the request.
            codec: codec of the model.

        Raises:
            PolicyError: there is no such tool, or the format is not JSON.
        """
        tools, choice = self._tools
        call = forced_call(tools, choice, codec)
        if call is not None:  # which a stop string would only break
            options = dataclasses.replace(options, stop=())
        if call is None and tools and options.grammar is not None:
            if (schema := self.response_format.schema_of_answer()) is None:
                raise PolicyError("tools go with a response_format of JSON, no other grammar")
            call = call_or_answer(tools, schema, codec)
        shown = SPECIAL if tools else ()
        return dataclasses.replace(options, grammar=call or options.grammar, special_tokens=shown)

    @property
    def offered(self) -> list[dict[str, Any]]:
        """Tools that may be called.

        Raises:
            PolicyError: a tool is not a function.
        """
        return self._tools[0]

    @property
    def _tools(self) -> tuple[list[dict[str, Any]], Any]:
        """Tools that may be called, and the choice among them."""
        tools, choice = allowed_tools(checked_tools(self.tools), self.tool_choice)
        return ([] if choice == "none" else tools), choice

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


def _listed(prompt: Any) -> Any:
    return [prompt] if isinstance(prompt, str) else prompt


class CompletionRequest(GenerationRequest):
    """A request to /v1/completions: texts to continue."""

    prompt: Annotated[
        list[str], BeforeValidator(_listed), Field(min_length=1, max_length=MOST_PROMPTS)
    ]
    logprobs: int | None = Field(default=None, ge=0, le=5)

    def options(self, limit: int) -> GenerationOptions:
        """See `GenerationRequest`."""
        return dataclasses.replace(super().options(limit), logprobs=self.logprobs)
