"""The order of layers and scorer on a device that runs them later than they are called.

On the CPU a run has ended when its call returns, so nothing waits for anything. On CUDA the layers
queue up on one stream and the scorer on another, and the host is ahead of both:

    layers   ... layer i-2 | E | layer i-1 .......... | layer i ...
    scorer                   E > scorer > copy | F
    host     calls all of the above, then waits for F and calls layer i as decided

E says that the input of layer i-1 exists, F that the decisions for the layers from i on are in the
host's memory. Layer i-1 runs meanwhile, so the queue of the layers does not drain.

Both streams wait for the default stream and it for them (the legacy one of CUDA), on which ORT
copies tokens to the device and logits from it: a token's writes come before its layers, and its
logits after them, without further events.

With CUDA graphs, what a decoded token runs on the layers' stream is recorded once it has run
twice, each (layer, action) for itself, and launched from then on: one call of the driver instead of
one for each kernel. While the driver records, nothing else in the process may use the layers' or
the default stream, so generations take turns: for a token, a prompt, or to load a graph.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from typing import Any

import numpy as np

from dash_onnx.core.errors import DeviceError
from dash_onnx.runtime.buffers import Buffer, Run
from dash_onnx.runtime.ort import Device, onnxruntime

_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile
_DRIVER = "libcuda.so.1"

_HOST = 3  # CU_GRAPH_NODE_TYPE_HOST

_WARM_UP = 2
"""Runs before the recording, so that ORT has all memory that it takes: it may not allocate then."""

_turn = threading.RLock()  # of the process: while one stream is recorded, all must wait


class Handover:
    """Hidden states to the scorer and its results to the host, once per look; of one sequence.

    This is the CPU's; see `Streams.handover`.

    Attributes:
        results: on the host; those of the scorer called last once `wait` has returned.
    """

    def __init__(self, results: np.ndarray):
        """Takes what the scorer writes, as the host sees it."""
        self.results = results

    def offer(self) -> None:
        """From here on the scorer may read what the layers called so far will have written."""

    def fetch(self) -> None:
        """Brings the results of the scorer called last to the host."""

    def wait(self) -> None:
        """Returns as soon as they are there."""


class Streams:
    """Where the sessions of a bundle run; this is the CPU's.

    Attributes:
        layers: address of the stream of embedding, layers and heads, or None for ORT's own.
        scorer: likewise of the scorer.
        run_options: of every run, or None.
        graphs: whether runs are recorded as CUDA graphs.
        turn: to be held by whoever uses the device; nothing where nothing is recorded.
    """

    layers: int | None = None
    scorer: int | None = None
    run_options: Any = None
    graphs: bool = False
    turn: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    def replayed(self, run: Run) -> Run:
        """The fastest way to a run of the layers' stream.

        Shapes, addresses and what it reads on the host must stay the same.
        """
        return run

    def handover(self, results: Buffer) -> Handover:
        """For a sequence, and for results that the scorer writes into a buffer."""
        return Handover(results.array)

    def drain(self) -> None:
        """Waits until every layer that was called has run."""


class CudaStreams(Streams):
    """Two CUDA streams. They live as long as the process, as ORT's sessions refer to them."""

    def __init__(self, driver: Any, graphs: bool = False, device: int = 0):
        """Creates the streams in the device's primary context, which ORT uses as well.

        Args:
            driver: the CUDA driver library, or what stands for it in a test.
            graphs: records runs as CUDA graphs.
            device: its number.

        Raises:
            DeviceError: the driver refuses.
        """
        self._driver = driver
        self.call("cuInit", 0)
        self._context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self.enter()
        self.layers, self.scorer = self._stream(), self._stream()
        self.graphs = graphs
        if graphs:
            self.turn = _turn
        self.run_options = onnxruntime().RunOptions()
        self.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def call(self, name: str, *arguments: Any) -> None:
        """Calls the driver.

        Raises:
            DeviceError: it returns an error.
        """
        if code := getattr(self._driver, name)(*arguments):
            raise DeviceError(f"CUDA driver: {name} failed with error {code}")

    def release_with(self, owner: object, *calls: tuple[str, ctypes.c_void_p]) -> None:
        """Makes calls that destroy handles, as pairs of name and handle, when their owner goes."""
        weakref.finalize(owner, _release, self, calls).atexit = False

    def enter(self) -> None:
        """Makes the context that of this thread."""
        self.call("cuCtxSetCurrent", self._context)

    def _stream(self) -> int:
        handle = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(handle), 0)
        return handle.value or 0

    def replayed(self, run: Run) -> Run:
        """See `Streams`."""
        return _Recorded(self, run) if self.graphs else run

    def handover(self, results: Buffer) -> Handover:
        """See `Streams`."""
        return _CudaHandover(self, results)

    def drain(self) -> None:
        """See `Streams`."""
        self.enter()
        self.call("cuStreamSynchronize", ctypes.c_void_p(self.layers))


class _Recorded:
    """A run that is recorded after a few times, and launched as a CUDA graph from then on."""

    def __init__(self, streams: CudaStreams, run: Run):
        self._streams, self._run = streams, run
        self._stream = ctypes.c_void_p(streams.layers)
        self._executable: ctypes.c_void_p | None = None
        self._warm = 0

    def __call__(self) -> None:
        if self._warm < _WARM_UP:
            self._warm += 1
            self._run()
            return
        self._streams.enter()
        if self._executable is None:
            self._executable = self._record()
            self._streams.release_with(self, ("cuGraphExecDestroy", self._executable))
        self._streams.call("cuGraphLaunch", self._executable, self._stream)

    def _record(self) -> ctypes.c_void_p:
        call, graph, executable = self._streams.call, ctypes.c_void_p(), ctypes.c_void_p()
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
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DeviceError(
                f"what a layer runs cannot be recorded as a CUDA graph ({reason}); load the bundle "
                "without CUDA graphs"
            ) from None
        finally:
            if graph.value:
                call("cuGraphDestroy", graph)
        return executable

    def _check(self, graph: ctypes.c_void_p) -> None:
        """Refuses a graph that holds nothing, or calls of the host.

        ORT before microsoft/onnxruntime#32121 frees memory of the host by such a call, which the
        second launch of a recording reads.
        """
        call, count, kind = self._streams.call, ctypes.c_size_t(), ctypes.c_int()
        call("cuGraphGetNodes", graph, None, ctypes.byref(count))
        nodes = (ctypes.c_void_p * count.value)()
        call("cuGraphGetNodes", graph, nodes, ctypes.byref(count))
        if not nodes:
            raise DeviceError("it is empty")
        for node in nodes:
            call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
            if kind.value == _HOST:
                raise DeviceError("this ONNX Runtime would call the host in it")


class _CudaHandover(Handover):
    def __init__(self, streams: CudaStreams, results: Buffer):
        self._streams, self._source = streams, results
        streams.enter()
        self._offered, self._fetched, self._host = (ctypes.c_void_p() for _ in range(3))
        size = int(np.prod(results.shape)) * results.dtype.itemsize
        self._size = ctypes.c_size_t(size)
        for event in (self._offered, self._fetched):
            streams.call("cuEventCreate", ctypes.byref(event), _NO_TIMING)
        # Only from page-locked memory is a copy beside running kernels possible.
        streams.call("cuMemHostAlloc", ctypes.byref(self._host), self._size, 0)
        memory: Any = (ctypes.c_char * size).from_address(self._host.value or 0)
        super().__init__(np.frombuffer(memory, results.dtype).reshape(results.shape))
        streams.release_with(
            self,
            ("cuEventDestroy_v2", self._offered),
            ("cuEventDestroy_v2", self._fetched),
            ("cuMemFreeHost", self._host),
        )

    def offer(self) -> None:
        self._streams.enter()
        self._streams.call("cuEventRecord", self._offered, ctypes.c_void_p(self._streams.layers))
        scorer = ctypes.c_void_p(self._streams.scorer)
        self._streams.call("cuStreamWaitEvent", scorer, self._offered, 0)

    def fetch(self) -> None:
        scorer = ctypes.c_void_p(self._streams.scorer)
        source = ctypes.c_uint64(self._source.pointer)
        self._streams.call("cuMemcpyDtoHAsync_v2", self._host, source, self._size, scorer)
        self._streams.call("cuEventRecord", self._fetched, scorer)

    def wait(self) -> None:
        self._streams.call("cuEventSynchronize", self._fetched)


def _release(streams: CudaStreams, calls: tuple[tuple[str, ctypes.c_void_p], ...]) -> None:
    streams.enter()
    for name, handle in calls:
        streams.call(name, handle)


def open_streams(device: Device, cuda_graphs: bool = False) -> Streams:
    """The streams of a device.

    Args:
        cuda_graphs: records runs as CUDA graphs.

    Raises:
        DeviceError: no CUDA driver, or CUDA graphs on another device.
    """
    if device == "cpu":
        if cuda_graphs:
            raise DeviceError(
                "CUDA graphs need --device cuda, and a bundle that was exported with it"
            )
        return Streams()
    try:
        return CudaStreams(ctypes.CDLL(_DRIVER), cuda_graphs)
    except OSError as error:
        raise DeviceError(f"no CUDA driver ({error}); install one, or use --device cpu") from None
