"""An answer as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator
from functools import lru_cache
from typing import Any

from starlette.datastructures import State
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dash_onnx.core.actions import path_letters
from dash_onnx.runtime.results import Chunk
from dash_onnx.serve.answer import Answer, Choice
from dash_onnx.serve.errors import APIError, outcome_of, refusing
from dash_onnx.serve.service import Job

_LOG = logging.getLogger(__name__)
_GRACE_S = 1.0  # seconds to report a timeout after the deadline
_END = "data: [DONE]\n\n"
_JSON = json.JSONEncoder(check_circular=False).encode  # some clients end a line at U+2028, too
_letters = lru_cache(1 << 10)(path_letters)


class EventStream(Response):
    """Events that the client must read by a deadline, so a slow reader cannot hold a slot.

    Each choice begins with its role and ends with its finish reason.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        state: State,
        job: Job,
        chunks: AsyncGenerator[tuple[int, Chunk], None],
        first: tuple[int, Chunk],
        answer: Answer,
        choices: list[Choice],
        *,
        usage: bool,
    ):
        """Does not send anything yet.

        Args:
            state: state of the request; its `outcome` is set.
            job: the generation.
            chunks: chunks of all choices, except the first chunk.
            first: the first chunk; its arrival means that the request was not refused.
            answer: builds the events.
            choices: take the chunks.
            usage: whether the last event has token counts.
        """
        super().__init__()
        del self.headers["content-length"]
        # A proxy must not collect or store events; the second is nginx's name for it.
        self.headers.update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._state, self._job, self._chunks, self._first = state, job, chunks, first
        self._answer, self._choices, self._usage = answer, choices, usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all events."""
        self._state.outcome = "closed"  # unless it completes
        async with contextlib.aclosing(self._chunks):
            try:
                async with asyncio.timeout_at(self._job.until + _GRACE_S):
                    await self._send(send)
            except TimeoutError:  # a client that does not read cannot be told
                self._state.outcome = "timeout"

    async def _send(self, send: Send) -> None:
        async def write(text: str, *, more: bool = True) -> None:
            try:
                body = text.encode()
                await send({"type": "http.response.body", "body": body, "more_body": more})
            except OSError:  # some servers report a disconnect like this
                raise APIError.gone() from None

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            with refusing():
                await write(self._told(*self._first))
                async for index, chunk in self._chunks:
                    await write(self._told(index, chunk))
            outcome, last = "done", _END
            if self._usage:
                last = _event(self._answer.usage(self._job.usage)) + _END
        except APIError as error:
            outcome, last = outcome_of(error.status), _event(error.body())
        except Exception:
            name = self._state.name
            _LOG.exception("%s failed", name, extra={"facts": {"request": name}})
            outcome, last = "error", _event(APIError.defect(name).body())
        await write(last, more=False)
        self._state.outcome = outcome

    def _told(self, index: int, chunk: Chunk) -> str:
        """The events of a chunk."""
        answer, choice, tally = self._answer, self._choices[index], self._job.tallies[index]
        events = []
        if chunk.generated_tokens == 1:
            events.append(answer.piece(index, None))
        facts = {
            "path": _letters(chunk.path),
            "ms": round(chunk.ms, 3),
            "cost": round(tally.last, 4),
        }
        said, reasoning, token = choice.add(chunk)
        piece = answer.piece(index, said, token=token, reasoning=reasoning, dash=facts)
        events.append(piece)
        if chunk.finish_reason is not None:
            if choice.calls:
                events.append(answer.piece(index, "", calls=choice.calls))
            reason = choice.finished(tally.finish_reason)
            events.append(answer.piece(index, "", reason, dash=tally.facts()))
        return "".join(map(_event, events))


def _event(data: dict[str, Any]) -> str:
    return f"data: {_JSON(data)}\n\n"
