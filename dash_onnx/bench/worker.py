"""A contender in a process of its own, so that none inherits another's threads or memory."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dash_onnx.bench.contenders import load
from dash_onnx.core.arrays import Logits
from dash_onnx.core.errors import DashError
from dash_onnx.runtime.machine import peak_rss_bytes


class Worker:
    """A running contender.

    Attributes:
        name: name in tables.
        load_s: seconds to load the model, including the import of its packages.
    """

    def __init__(self, name: str, *contender: Any):
        """Starts it and waits until its model is loaded.

        Args:
            name: name in tables.
            contender: the arguments of `contenders.load`.

        Raises:
            DashError: the model cannot be loaded.
        """
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix="dash-bench-")
        self._log = Path(self._folder.name) / "log"
        self._log.touch()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._log, contender), daemon=True
        )
        self._process.start()
        theirs.close()
        self.load_s: float = self._answer()

    def decode(self, ids: list[int], new: int) -> list[float]:
        """See `Contender`."""
        return self._ask("decode", ids, new)

    def logits(self, ids: list[int], prompt_tokens: int) -> Logits | None:
        """See `Contender`."""
        return self._ask("logits", ids, prompt_tokens)

    def peak_rss_bytes(self) -> int:
        """Highest resident memory of its process so far."""
        return self._ask("memory")

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join()
        self._folder.cleanup()

    def _ask(self, *question: Any) -> Any:
        try:
            self._pipe.send(question)
        except BrokenPipeError:
            pass  # it died; its message is reported below
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            said = self._log.read_text("utf-8", "replace").strip().splitlines()
            raise DashError(f"{self.name} stopped: {said[-1] if said else 'no message'}") from None
        if isinstance(answer, DashError):
            raise DashError(f"{self.name}: {answer}")
        return answer


def _serve(pipe: Connection, log: Path, contender: tuple[Any, ...]) -> None:
    """The process: loads, then answers until the pipe is closed."""
    # Output of the peer's libraries would garble the table.
    os.dup2(os.open(log, os.O_WRONLY), 2)
    os.dup2(2, 1)
    started = time.perf_counter()
    try:
        loaded = load(*contender)
    except DashError as error:
        pipe.send(DashError(str(error)))
        return
    pipe.send(time.perf_counter() - started)
    while True:
        try:
            what, *arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(peak_rss_bytes() if what == "memory" else getattr(loaded, what)(*arguments))
