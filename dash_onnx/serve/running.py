"""Generations that run elsewhere than their request: in a batch, or in threads by turns."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, Protocol

from dash_onnx.core.budget import Budget
from dash_onnx.core.policy import Policy
from dash_onnx.runtime.batch import Batch, Request
from dash_onnx.runtime.generate import Chunk
from dash_onnx.runtime.stream import Stream

_IDLE_S = 0.5  # a thread that has nothing to do looks up


class Running(Protocol):
    """A generation that runs elsewhere."""

    @property
    def policy(self) -> Policy:
        """What decides the next token."""

    async def next(self) -> Chunk | None:
        """Its next chunk; None after the last."""

    def set_budget(self, budget: Budget) -> None:
        """From the next token on."""

    def close(self) -> None:
        """Ends it."""


class Alone:
    """A generation of its own, each token in a thread."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self.set_budget, self.close = stream.set_budget, stream.close

    @classmethod
    async def begun(cls, begin: Callable[[], Stream]) -> Alone:
        """Runs the prompt.

        One that nobody waits for any more still runs to its end, and only then gives up its place.
        """
        stream = asyncio.ensure_future(asyncio.to_thread(begin))
        try:
            return cls(await asyncio.shield(stream))
        except asyncio.CancelledError:
            await until_done(stream)
            if stream.exception() is None:
                stream.result().close()
            raise

    @property
    def policy(self) -> Policy:
        """See `Running`."""
        return self._stream.policy

    async def next(self) -> Chunk | None:
        """See `Running`."""
        return await asyncio.to_thread(next, self._stream, None)


async def until_done(*tasks: asyncio.Future[Any]) -> None:
    """Waits for tasks, also when cancelled meanwhile: by a timeout, and by a client that leaves."""
    while not all(task.done() for task in tasks):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(tasks)


class Together:
    """A generation in a batch, whose thread delivers chunks to this one's event loop."""

    request: Request

    def __init__(self) -> None:
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue[Chunk | Exception]()
        self._ended = False

    def deliver(self, piece: Chunk | Exception) -> None:
        """Called by the thread of the batch."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and its clients with it
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    @property
    def policy(self) -> Policy:
        """See `Running`."""
        return self.request.current.policy

    async def next(self) -> Chunk | None:
        """See `Running`."""
        if self._ended:
            return None
        piece = await self._pieces.get()
        if isinstance(piece, Exception):
            raise piece
        self._ended = piece.finish_reason is not None
        return piece

    def set_budget(self, budget: Budget) -> None:
        """See `Running`."""
        self.request.current.set_budget(budget)

    def close(self) -> None:
        """See `Running`."""
        self.request.cancelled.set()


class BatchThread:
    """Runs the steps of a batch."""

    def __init__(self, batch: Batch):
        self.submit = batch.submit
        self._batch, self._closed = batch, False
        self._thread = threading.Thread(target=self._run, name="batch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed:
            if not self._batch.step():
                self._batch.wait(_IDLE_S)

    @property
    def reused(self) -> int:
        """Prompt tokens that a row or a prefix held."""
        return self._batch.reused

    @property
    def alive(self) -> bool:
        """Whether it runs: only a defect ends it before its time."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Ends the thread after the current step, and saves what the batch keeps on disk."""
        self._closed = True
        self._thread.join()
        self._batch.save()
