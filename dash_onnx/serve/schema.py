"""Requests and answers of OpenAI's API, as far as they are served, and our fields in them."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dash_onnx.core.errors import PolicyError
from dash_onnx.runtime.options import GenerationOptions

_ROLES = ("system", "developer", "user", "assistant", "tool")
# Asked for, each of them would change the answer: better refused than ignored.
_UNSERVED = ("tools", "functions", "logit_bias", "audio", "modalities", "prediction")


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    include_usage: bool = False


class Generation(BaseModel):
    """What both kinds of requests have; unknown fields are ignored, as OpenAI's server does not."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=8)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    # Ours.
    policy: str = ""
    budget: float | str | None = None
    speculate: Literal["off", "ngram", "dash", "auto"] = "off"
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def options(self, most_tokens: int) -> GenerationOptions:
        """What the runtime is asked for.

        Args:
            most_tokens: an answer has no more.

        Raises:
            PolicyError: a field asks for what is not served, or is out of range.
        """
        extra = self.model_extra or {}
        unserved = [name for name in _UNSERVED if extra.get(name)]
        if extra.get("logprobs") or extra.get("top_logprobs"):
            unserved.append("logprobs")
        if (extra.get("response_format") or {"type": "text"}) != {"type": "text"}:
            unserved.append("response_format")
        unserved += [
            name for name in ("frequency_penalty", "presence_penalty") if getattr(self, name)
        ]
        if "@" in self.policy:  # a file, where the user of a command line names one
            raise PolicyError("a request names no file: give the policy's list itself")
        if unserved:
            raise PolicyError(f"{', '.join(unserved)}: not served; leave it out")
        wanted = self.max_completion_tokens or self.max_tokens or most_tokens
        return GenerationOptions(
            policy=self.policy,
            budget=self.budget,
            speculate=self.speculate,
            max_new_tokens=min(wanted, most_tokens),
            stop=self.stop or (),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


class ChatRequest(Generation):
    """Of /v1/chat/completions."""

    messages: list[dict[str, Any]]

    def prompt(self) -> list[dict[str, Any]]:
        """The messages, with roles that templates know.

        Raises:
            PolicyError: a role is none of OpenAI's.
        """
        for message in self.messages:
            if message.get("role") not in _ROLES:
                raise PolicyError(f"the role of a message must be one of {', '.join(_ROLES)}")
        return [
            {**message, "role": "system" if message["role"] == "developer" else message["role"]}
            for message in self.messages
        ]


class CompletionRequest(Generation):
    """Of /v1/completions: text to continue."""

    prompt: str


class Answer:
    """The JSON of one answer, whole or in pieces."""

    def __init__(self, model: str, *, chat: bool):
        """Gives it an id."""
        self._chat = chat
        kind = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}
        self._kind = kind

    def whole(self, texts: list[str], reasons: list[str], **more: Any) -> dict[str, Any]:
        """All choices."""
        choices = [
            {"index": index, "finish_reason": reason, "logprobs": None, **self._content(text)}
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return {**self._head, "object": self._kind, "choices": choices, **more}

    def piece(
        self, index: int, text: str | None, reason: str | None = None, **more: Any
    ) -> dict[str, Any]:
        """A piece of a choice; None begins it."""
        kind = "chat.completion.chunk" if self._chat else self._kind
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        if not self._chat:
            choice["text"] = text or ""
        elif text is None:
            choice["delta"] = {"role": "assistant", "content": ""}
        else:
            choice["delta"] = {"content": text} if text else {}
        return {**self._head, "object": kind, "choices": [choice], **more}

    def usage(self, counts: dict[str, int]) -> dict[str, Any]:
        """The last piece of a stream that asked for it."""
        kind = "chat.completion.chunk" if self._chat else self._kind
        return {**self._head, "object": kind, "choices": [], "usage": counts}

    def _content(self, text: str) -> dict[str, Any]:
        if self._chat:
            return {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"text": text}
