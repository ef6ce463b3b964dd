"""Generations that run in other threads than the event loop: together in a batch, or each alone."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dash_onnx.core.policy import Policy
from dash_onnx.runtime.batch import Batch, Deliver, Request
from dash_onnx.runtime.generate import Chunk
from dash_onnx.runtime.stream import Stream

_IDLE_S = 0.5  # a thread that has nothing to do looks up


@dataclass(frozen=True)
class Running:
    """A generation that runs in another thread.

    Attributes:
        policy: that decides for it.
        close: ends it, at the latest after the token in progress.
    """

    policy: Policy
    close: Callable[[], None]


async def run_alone(begin: Callable[[], Stream], put: Deliver) -> Running:
    """Runs the prompt, and then the answer in a thread of its own.

    A prompt that nobody waits for any more still runs to its end, and only then gives up its place.

    Args:
        begin: runs the prompt.
        put: takes chunks, and what ends them before their time; called by the event loop.
    """
    loop, begun = asyncio.get_running_loop(), asyncio.ensure_future(asyncio.to_thread(begin))
    try:
        stream = await asyncio.shield(begun)
    except asyncio.CancelledError:
        await until_done(begun)
        if begun.exception() is None:
            begun.result().close()
        raise

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and its clients with it
            try:
                for chunk in stream:
                    loop.call_soon_threadsafe(put, chunk)
            except Exception as error:
                loop.call_soon_threadsafe(put, error)

    threading.Thread(target=run, name="alone", daemon=True).start()
    return Running(stream.policy, stream.close)


async def until_done(*tasks: asyncio.Future[Any]) -> None:
    """Waits for tasks, also when cancelled meanwhile: by a timeout, and by a client that leaves."""
    while not all(task.done() for task in tasks):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(tasks)


class BatchThread:
    """Runs the steps of a batch, and wakes the event loop once a step."""

    def __init__(self, batch: Batch):
        self._batch, self._closed = batch, False
        self._pieces: list[tuple[Deliver, Chunk | Exception]] = []  # of the step in progress
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="batch", daemon=True)
        self._thread.start()

    async def run(self, request: Callable[[Deliver], Request], put: Deliver) -> Running:
        """Adds a generation.

        Args:
            request: makes it, given what takes its chunks in the thread.
            put: takes them in the event loop.
        """
        self._loop = asyncio.get_running_loop()

        def deliver(piece: Chunk | Exception) -> None:
            self._pieces.append((put, piece))
            if isinstance(piece, Chunk) and piece.generated_tokens == 1:
                self._hand_over()  # a pass of the others may follow in the same step

        made = await asyncio.to_thread(request, deliver)
        self._batch.submit(made)
        return Running(made.current.policy, made.cancelled.set)

    def _run(self) -> None:
        while not self._closed:
            busy = self._batch.step()
            self._hand_over()
            if not busy:
                self._batch.wait(_IDLE_S)

    def _hand_over(self) -> None:
        pieces, self._pieces = self._pieces, []
        if pieces and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and its clients with it
                self._loop.call_soon_threadsafe(_put_all, pieces)

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


def _put_all(pieces: list[tuple[Deliver, Chunk | Exception]]) -> None:
    for put, piece in pieces:
        put(piece)
