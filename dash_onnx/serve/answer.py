"""Answers of OpenAI's API: their texts as they come, and their JSON."""

from __future__ import annotations

import time
import uuid
from collections import deque
from typing import Any, NamedTuple, Protocol

from dash_onnx.core.text import Detokenizer, TextCodec
from dash_onnx.runtime.results import Chunk
from dash_onnx.serve.calls import SPECIAL, CallReader, recipient
from dash_onnx.serve.errors import APIError
from dash_onnx.serve.service import Job, Tally

_HEADER = 100  # most tokens of a header that names a function


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

    def __init__(
        self,
        codec: TextCodec,
        tools: list[dict[str, Any]],
        most_calls: int | None = None,
        *,
        tagged: bool = False,
    ):
        """Starts an empty text.

        Args:
            codec: codec of the model.
            tools: tools whose calls are detected.
            most_calls: most calls that are returned; None returns all.
            tagged: see `CallReader`.
        """
        self._most_calls, self._cut = most_calls, False
        self._reader = CallReader(tools, tagged=tagged)
        self._codec = codec
        self._control = [word for word in SPECIAL if tools and word in codec.control]
        self._thoughts = deque[int](maxlen=_HEADER)  # their end may be the header of a call
        tags = codec.tags if tools and not tagged else None
        self._heads = frozenset[int]() if tags is None else tags.heads
        self._called = False
        self._detokenizer, self._offset = Detokenizer(codec), 0
        self.text, self.reasoning = "", ""
        self.calls: list[dict[str, Any]] = []
        self.tokens: list[TokenLogprobs] = []

    def add(self, chunk: Chunk) -> tuple[str, str, TokenLogprobs | None]:
        """Adds a chunk; returns the text that is certain, thoughts, and log probabilities."""
        text, reasoning = chunk.text, chunk.reasoning
        if chunk.thinking and self._heads:
            header = self._header(chunk.token)
            self._called = bool(header) or (self._called and chunk.token not in self._heads)
            if self._called:
                text, reasoning = header + reasoning, ""
        said = self._reader.add(text)
        if chunk.finish_reason is not None:
            whole = chunk.finish_reason == "stop" and chunk.token in self._codec.eos_token_ids
            rest, calls = self._reader.finish(limited=not whole)  # a stop string may cut a call
            self.calls = calls[: self._most_calls]
            self._cut = self._reader.cut and len(self.calls) != self._most_calls
            said += rest
        for word in self._control:  # it could not come back in a message
            said = said.replace(word, "")
        self.text += said
        self.reasoning += reasoning
        token = None
        if chunk.logprobs is not None:
            own, top = chunk.logprobs
            content = self._entry(chunk.token, own)
            content["top_logprobs"] = [self._entry(*one) for one in top]
            token = TokenLogprobs(content, self._offset)
            self.tokens.append(token)
            self._offset += len(self._detokenizer.add(chunk.token))
        return said, reasoning, token

    def finished(self, reason: str) -> str:
        """Why the text ended, given why its generation did."""
        return "tool_calls" if self.calls and not self._cut else reason

    def _header(self, token: int) -> str:
        """The header of a call that ends with this token of the thoughts, as in gpt-oss; or ""."""
        tags = self._codec.tags
        self._thoughts.append(token)
        if tags is None or token != tags.close:
            return ""
        return recipient(self._codec.tokenizer.decode([*self._thoughts], skip_special_tokens=False))

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self._codec.piece(token), self._codec.piece_bytes(token)
        return {"token": text, "logprob": logprob, "bytes": [*raw]}


class Answer(Protocol):
    """The JSON of one answer, whole or streamed in events.

    Attributes:
        end: what a stream ends with.
    """

    end: str

    def add(self, index: int, chunk: Chunk, tally: Tally) -> list[dict[str, Any]]:
        """Adds a chunk of a choice; returns its events."""

    def last(self, job: Job) -> list[dict[str, Any]]:
        """The events after the last chunk."""

    def whole(self, job: Job) -> dict[str, Any]:
        """The whole answer, after the last chunk."""

    def failed(self, error: APIError) -> dict[str, Any]:
        """The last event of an answer that ends early."""


class Completions:
    """Answers of /v1/chat/completions and /v1/completions; see `Answer`.

    In a stream, each choice begins with its role and ends with its finish reason.
    """

    end = "data: [DONE]\n\n"

    def __init__(self, model: str, choices: list[Choice], *, chat: bool, usage: bool):
        """Gives it an id.

        Args:
            model: name of the model.
            choices: take the chunks.
            chat: which of the two paths.
            usage: whether a stream ends with token counts.
        """
        self._choices, self._chat, self._usage = choices, chat, usage
        self._kind, prefix = (
            ("chat.completion", "chatcmpl") if chat else ("text_completion", "cmpl")
        )
        self._piece_kind = f"{self._kind}.chunk" if chat else self._kind
        name = f"{prefix}-{uuid.uuid4().hex}"
        self._head = {"id": name, "created": int(time.time()), "model": model}

    def add(self, index: int, chunk: Chunk, tally: Tally) -> list[dict[str, Any]]:
        """See `Answer`."""
        choice, events = self._choices[index], list[dict[str, Any]]()
        if chunk.generated_tokens == 1:
            events.append(self._piece(index, {"role": "assistant", "content": ""}))
        said, reasoning, token = choice.add(chunk)
        delta = {"content": said} if said else {}
        if reasoning:
            delta["reasoning_content"] = reasoning
        facts = tally.facts_of(chunk)
        logprobs = self._logprobs([token] if token else [])
        events.append(self._piece(index, delta, logprobs=logprobs, dash=facts))
        if chunk.finish_reason is not None:
            if choice.calls:
                calls = [{"index": number, **call} for number, call in enumerate(choice.calls)]
                events.append(self._piece(index, {"tool_calls": calls}))
            reason = choice.finished(tally.finish_reason)
            events.append(self._piece(index, {}, reason, dash=tally.facts()))
        return events

    def last(self, job: Job) -> list[dict[str, Any]]:
        """See `Answer`."""
        head = {**self._head, "object": self._piece_kind, "choices": []}
        return [{**head, "usage": job.usage}] if self._usage else []

    def whole(self, job: Job) -> dict[str, Any]:
        """See `Answer`."""
        found = [
            {
                "index": index,
                "finish_reason": choice.finished(tally.finish_reason),
                "logprobs": self._logprobs(choice.tokens),
                **self._content(choice),
            }
            for index, (choice, tally) in enumerate(zip(self._choices, job.tallies, strict=True))
        ]
        facts = {"usage": job.usage, "dash": job.tallies[0].facts()}
        return {**self._head, "object": self._kind, "choices": found, **facts}

    def failed(self, error: APIError) -> dict[str, Any]:
        """See `Answer`."""
        return error.body()

    def _piece(
        self,
        index: int,
        delta: dict[str, Any],
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """An event of a choice, with additional fields of the answer."""
        content = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        choice = {"index": index, "finish_reason": reason, "logprobs": logprobs, **content}
        return {**self._head, "object": self._piece_kind, "choices": [choice], **more}

    def _logprobs(self, tokens: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not tokens:
            return None
        content = [token.content for token in tokens]
        if self._chat:
            return {"content": content, "refusal": None}
        return {
            "tokens": [token["token"] for token in content],
            "token_logprobs": [token["logprob"] for token in content],
            "top_logprobs": [_by_text(token["top_logprobs"]) for token in content],
            "text_offset": [token.offset for token in tokens],
        }

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


def _by_text(tokens: list[dict[str, Any]]) -> dict[str, float]:
    """Log probabilities by text; of parts of characters, which look alike, the most likely one."""
    found: dict[str, float] = {}
    for one in tokens:
        found.setdefault(one["token"], one["logprob"])
    return found
