"""What a token runs as CUDA graphs: one launch per layer, not one per kernel.

Each (layer, action) is captured separately once it has run twice, and launched from then on, until
the K/V cache moves. ORT's own capture frees nothing before its session ends.

During a capture, nothing else in the process may use the layers' or the default stream: see the
lock in `backend.py`.
"""

from __future__ import annotations

import contextlib
import ctypes

from dash_onnx.core.errors import DeviceError, first_line
from dash_onnx.runtime.buffers import Run
from dash_onnx.runtime.cuda.backend import CudaBackend

_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile
_HOST = 3  # CU_GRAPH_NODE_TYPE_HOST

_WARM_UP = 2
"""Runs before the capture, so that ORT has allocated all its memory: it must not allocate then."""


class CudaGraphBackend(CudaBackend):
    """Two streams of one device, and captured graphs of what runs on the first."""

    def longest(self, total: int, seq: int, capacity: int) -> int:
        """See `Backend`; a captured graph keeps what it read: a bound for all its launches."""
        return capacity if seq == 1 else total

    def repeated(self, run: Run) -> Run:
        """See `Backend`; captures it after a few runs."""
        return _RecordedRun(self, run)


class _RecordedRun:
    """A run that is captured after a few runs, and launched as a CUDA graph from then on."""

    def __init__(self, backend: CudaBackend, run: Run):
        self._driver, self._stream, self._run = backend.driver, backend.layers, run
        self._executable: ctypes.c_void_p | None = None
        self._warm = 0

    def __call__(self) -> None:
        if self._warm < _WARM_UP:
            self._warm += 1
            self._run()
            return
        self._driver.enter()
        if self._executable is None:
            self._executable = self._record()
            self._driver.release_with(self, ("cuGraphExecDestroy", self._executable))
        self._driver.call("cuGraphLaunch", self._executable, self._stream)

    def _record(self) -> ctypes.c_void_p:
        call, graph, executable = self._driver.call, ctypes.c_void_p(), ctypes.c_void_p()
        end = ("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        try:
            call("cuStreamBeginCapture_v2", self._stream, _THREAD_LOCAL)
            try:
                self._run()
            except BaseException:
                with contextlib.suppress(DeviceError):  # the stream must be free in any case
                    call(*end)
                raise
            call(*end)
            self._check(graph)
            call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
        except Exception as error:  # ORT raises types of its C extension, without a common base
            raise DeviceError(
                f"a layer cannot be captured as a CUDA graph ({first_line(error)}); load "
                "the bundle without CUDA graphs"
            ) from None
        finally:
            if graph.value:
                call("cuGraphDestroy", graph)
        return executable

    def _check(self, graph: ctypes.c_void_p) -> None:
        """Refuses a graph that is empty, or that calls the host.

        ORT before microsoft/onnxruntime#32121 frees host memory in such a call, which the second
        launch of the graph reads.
        """
        call, count, kind = self._driver.call, ctypes.c_size_t(), ctypes.c_int()
        call("cuGraphGetNodes", graph, None, ctypes.byref(count))
        nodes = (ctypes.c_void_p * count.value)()
        call("cuGraphGetNodes", graph, nodes, ctypes.byref(count))
        if not nodes:
            raise DeviceError("it is empty")
        for node in nodes:
            call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
            if kind.value == _HOST:
                raise DeviceError("this ONNX Runtime would call the host in it")
