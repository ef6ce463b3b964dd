"""An answer as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from starlette.datastructures import State
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dash_onnx.runtime.results import Chunk
from dash_onnx.serve.answer import Answer
from dash_onnx.serve.errors import APIError, outcome_of, refusing
from dash_onnx.serve.service import Job

_LOG = logging.getLogger(__name__)
_COMMENT = ":\n\n"  # keeps a proxy from closing a silent connection
_GRACE_S = 1.0  # seconds to report a timeout after the deadline
_JSON = json.JSONEncoder(check_circular=False).encode  # some clients end a line at U+2028, too


class EventStream(Response):
    """Events that the client must read by a deadline, so a slow reader cannot hold a slot."""

    media_type = "text/event-stream"

    def __init__(
        self,
        state: State,
        job: Job,
        chunks: AsyncGenerator[tuple[int, Chunk], None],
        first: tuple[int, Chunk],
        answer: Answer,
    ):
        """Does not send anything yet.

        Args:
            state: state of the request; its `outcome` is set.
            job: the generation.
            chunks: chunks of all choices, except the first chunk.
            first: the first chunk; its arrival means that the request was not refused.
            answer: takes the chunks, and makes the events.
        """
        super().__init__()
        del self.headers["content-length"]
        # A proxy must not collect or store events; the second is nginx's name for it.
        self.headers.update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._state, self._job, self._chunks, self._first = state, job, chunks, first
        self._answer = answer

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
        answer = self._answer

        def told(index: int, chunk: Chunk) -> str:
            found = answer.add(index, chunk, self._job.tallies[index])
            return _events(found) or _COMMENT

        async def write(text: str, *, more: bool = True) -> None:
            try:
                body = text.encode()
                await send({"type": "http.response.body", "body": body, "more_body": more})
            except OSError:  # some servers report a disconnect like this
                raise APIError.gone() from None

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            with refusing():
                await write(told(*self._first))
                async for index, chunk in self._chunks:
                    await write(told(index, chunk))
            outcome, last = "done", _events(answer.last(self._job)) + answer.end
        except APIError as error:
            outcome, last = outcome_of(error.status), _events([answer.failed(error)])
        except Exception:
            name = self._state.name
            _LOG.exception("%s failed", name, extra={"facts": {"request": name}})
            outcome, last = "error", _events([answer.failed(APIError.defect(name))])
        await write(last, more=False)
        self._state.outcome = outcome


def _events(found: list[dict[str, Any]]) -> str:
    """Events in their format; those of a type also have its name."""
    names = (f"event: {event['type']}\n" if "type" in event else "" for event in found)
    return "".join(
        f"{name}data: {_JSON(event)}\n\n" for name, event in zip(names, found, strict=True)
    )
