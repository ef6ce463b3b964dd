"""Generations that run together in a thread separate from the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

from dash_onnx.core.errors import DashError
from dash_onnx.runtime.generate import Request
from dash_onnx.runtime.results import Chunk
from dash_onnx.runtime.scheduler import Scheduler

_LOG = logging.getLogger(__name__)

Deliver = Callable[[Chunk | Exception], None]
"""Takes the chunks of a generation, and the exception if one ended it early."""

_IDLE_S = 0.5  # seconds between checks of an idle thread


async def until_done(*tasks: asyncio.Future[Any]) -> None:
    """Waits for tasks even if cancelled meanwhile, by a timeout or a client that disconnects."""
    while not all(task.done() for task in tasks):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(tasks)


class BatchThread:
    """Runs the steps of a scheduler, and wakes the event loop once per step."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler, self._closed = scheduler, False
        self._pieces: list[tuple[Deliver, Chunk | Exception]] = []  # chunks of the step in progress
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="batch", daemon=True)
        self._thread.start()

    def run(self, request: Request[Chunk]) -> None:
        """Adds a generation, whose pieces are delivered in the event loop."""
        self._loop, put = asyncio.get_running_loop(), request.deliver

        def deliver(piece: Chunk | Exception) -> None:
            if isinstance(piece, Exception) and not isinstance(piece, DashError):
                _LOG.error("a generation failed", exc_info=piece)
            self._pieces.append((put, piece))
            if isinstance(piece, Chunk) and piece.generated_tokens == 1:
                self._hand_over()  # a pass of other generations may follow in the same step

        request.deliver = deliver
        self._scheduler.submit(request)

    def _run(self) -> None:
        while not self._closed:
            busy = self._scheduler.step()
            self._hand_over()
            if not busy:
                self._scheduler.wait(_IDLE_S)

    def _hand_over(self) -> None:
        pieces, self._pieces = self._pieces, []
        if pieces and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and its clients with it
                self._loop.call_soon_threadsafe(_put_all, pieces)

    @property
    def reused(self) -> int:
        """Number of prompt tokens reused from a slot or a prefix."""
        return self._scheduler.reused

    @property
    def alive(self) -> bool:
        """Whether the thread runs: only a bug ends it early."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Ends the thread after the current step, and saves the prefixes kept on disk."""
        self._closed = True
        self._thread.join()
        self._scheduler.save()


def _put_all(pieces: list[tuple[Deliver, Chunk | Exception]]) -> None:
    for put, piece in pieces:
        put(piece)
