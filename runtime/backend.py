"""What differs between devices: here the CPU backend; `dash_onnx.runtime.cuda` is the other one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from dash_onnx.runtime.buffers import Buffer, Run
from dash_onnx.runtime.ort import Device, create_session


class AsyncRun:
    """A run whose result may arrive after the call has returned; on the CPU it never does."""

    def __init__(self, run: Run, output: Buffer):
        """Takes the run and the buffer that it writes."""
        self.start = run
        self._output = output

    def result(self) -> np.ndarray:
        """Waits for the run started last; returns the buffer's content, on the host."""
        return self._output.array


class Backend:
    """Where the graphs of a bundle run.

    Attributes:
        device: its name.
        run_options: ORT's options for every run, or None.
        joins: whether layers that always take the same action run as one graph.
        lock: held while a graph is loaded or a token runs, on devices where these must not overlap.
    """

    device: Device = "cpu"
    run_options: Any = None
    joins = True

    def __init__(self) -> None:
        """The CPU needs nothing."""
        self.lock: AbstractContextManager[Any] = nullcontext()

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A tensor of zeros on the device."""
        return Buffer(shape, dtype)

    def session(self, graph: Path | bytes, *, scorer: bool = False, **options: Any) -> Any:
        """Loads a graph; the scorer's may run beside the others. For options: `create_session`.

        Raises:
            BundleError: ORT refuses the graph.
        """
        return create_session(graph, self.device, **options)

    def repeated(self, run: Run) -> Run:
        """A run that will be repeated with the same shapes and addresses."""
        return run

    def asynchronous(self, run: Run, output: Buffer) -> AsyncRun:
        """The scorer's run, ordered after the layers called before it, its result on the host."""
        return AsyncRun(run, output)

    def longest(self, total: int, seq: int, capacity: int) -> int:
        """The length of the longest sequence that graphs read on the host.

        Args:
            total: its tokens after the pass.
            seq: tokens of the pass.
            capacity: capacity of the K/V cache.
        """
        return total

    def synchronize(self) -> None:
        """Waits until everything that was started has run."""
