"""What differs between devices. This is the CPU's; `dash_onnx.runtime.cuda` has the other one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dash_onnx.core.contract import Ports
from dash_onnx.core.errors import DeviceError
from dash_onnx.runtime.buffers import Buffer, Run, bound_run
from dash_onnx.runtime.ort import Device, check_device, create_session

if TYPE_CHECKING:
    from dash_onnx.runtime.sequence import SequenceState
    from dash_onnx.runtime.sessions import Sessions


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
        run_options: of every run, or None.
        joins: whether layers that always take the same action run as one graph.
        cuts: whether a tensor's memory can be used in parts.
        lock: held while a graph is loaded, by devices where that must not happen beside others.
    """

    device: Device = "cpu"
    run_options: Any = None
    joins = True
    cuts = True

    def __init__(self) -> None:
        """The CPU needs nothing."""
        self.lock: AbstractContextManager[Any] = nullcontext()

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A tensor of zeros on the device."""
        return Buffer(shape, dtype)

    def session(self, graph: Path, *, scorer: bool = False) -> Any:
        """Loads a graph; the scorer's may run beside the others.

        Raises:
            BundleError: ORT refuses the graph.
        """
        return create_session(graph, self.device)

    def joined(self, graph: bytes, weights: Path) -> Any:
        """Loads a graph of several layers, whose weights lie in a bundle's folder; likewise."""
        return create_session(graph, self.device, weights=weights)

    def bound(
        self,
        session: Any,
        ports: Ports,
        inputs: Sequence[Buffer],
        outputs: Sequence[Buffer],
        *,
        once: bool,
    ) -> Run:
        """Binds every port of a graph to a buffer, see `bound_run`.

        Args:
            session: of the graph.
            ports: that it has.
            inputs: a buffer for each.
            outputs: likewise.
            once: for a pass that may not come again, as of a prompt.
        """
        return bound_run(session, ports, inputs, outputs, self.run_options)

    def asynchronous(self, run: Run, output: Buffer) -> AsyncRun:
        """The scorer's run, ordered after the layers called before it, its result on the host."""
        return AsyncRun(run, output)

    def sequence(self, sessions: Sessions, capacity: int, batch: int) -> SequenceState:
        """The state of a new, empty sequence, or of a batch of them; see there."""
        from dash_onnx.runtime.sequence import SequenceState

        return SequenceState(sessions, capacity, batch)

    def synchronize(self) -> None:
        """Waits until everything that was called has run."""


def open_backend(device: str, *, cuda_graphs: bool = False) -> Backend:
    """The backend of a device.

    Args:
        device: `cpu` or `cuda`.
        cuda_graphs: records what a token runs as CUDA graphs.

    Raises:
        DeviceError: this ONNX Runtime or this machine lacks the device, or CUDA graphs are wanted
            on another one.
    """
    check_device(device)
    if device == "cuda":
        from dash_onnx.runtime.cuda import open_cuda

        return open_cuda(graphs=cuda_graphs)
    if cuda_graphs:
        raise DeviceError("CUDA graphs need --device cuda, and a bundle that was exported with it")
    return Backend()
