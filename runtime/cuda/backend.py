"""Layers on one CUDA stream, the scorer on another, and the host ahead of both.

    layers   ... layer i-2 | E | layer i-1 .......... | layer i ...
    scorer                   E > scorer > copy | F
    host     calls all of the above, then waits for F and calls layer i as decided

E signals that the input of layer i-1 exists, F that the decisions for the layers from i on are in
host memory. Layer i-1 runs meanwhile, so the queue of the layers does not drain.

Both streams synchronize with CUDA's legacy default stream, on which ORT copies tokens to the device
and logits from it: a token's writes come before its layers, and its logits after them, without
further events.
"""

from __future__ import annotations

import ctypes
import math
import threading
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

from dash_onnx.core.errors import DeviceError, first_line
from dash_onnx.runtime.backend import AsyncRun, Backend
from dash_onnx.runtime.buffers import Buffer, Run
from dash_onnx.runtime.cuda.driver import Driver
from dash_onnx.runtime.ort import Device, create_session, onnxruntime, prepare_cuda

_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING

_lock = threading.RLock()
"""Held while the process uses the device: sessions of one stream share its handles, and while a
CUDA graph is captured, any copy on the default stream fails."""


class CudaBuffer(Buffer):
    """A tensor in the memory of the device, which the host reads and writes by copies.

    The copies run on CUDA's legacy default stream: after what both streams were given before, and
    before what they are given next.
    """

    device: Device = "cuda"

    def __init__(self, shape: tuple[int, ...], dtype: str, driver: Driver):
        """Allocates zeros.

        Raises:
            DeviceError: the device does not have enough free memory.
        """
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._driver = driver
        try:
            zeros = np.zeros(shape, self.dtype)
            with _lock:
                self._value = onnxruntime().OrtValue.ortvalue_from_numpy(zeros, self.device, 0)
        except Exception as error:  # ORT raises types of its C extension, without a common base
            size = math.prod(shape) * self.dtype.itemsize
            raise DeviceError(
                f"no {size / 1e6:.0f} MB of free memory on the GPU ({first_line(error)}); "
                "stop other programs there, or choose a shorter context"
            ) from None
        self.pointer = int(self._value.data_ptr())

    @property
    def array(self) -> np.ndarray:
        """A copy of the content."""
        content = np.empty(self.shape, self.dtype)
        self._copy("cuMemcpyDtoH_v2", content.ctypes.data, self.pointer, content.nbytes)
        return content

    def write(self, content: Any, where: Any = ...) -> None:
        """See `Buffer`."""
        whole = np.empty(self.shape, self.dtype) if where is ... else self.array
        whole[where] = content
        self._copy("cuMemcpyHtoD_v2", self.pointer, whole.ctypes.data, whole.nbytes)

    def take(self, other: Buffer, tokens: int) -> None:
        """See `Buffer`."""
        *heads, length, size = self.shape
        token = size * self.dtype.itemsize
        for head in range(math.prod(heads)):
            target, source = (
                buffer.pointer + head * capacity * token
                for buffer, capacity in ((self, length), (other, other.shape[-2]))
            )
            self._copy("cuMemcpyDtoD_v2", target, source, tokens * token)

    def part(self, start: int, stop: int) -> Buffer:
        """See `Buffer`."""
        part = copy(self)
        part.shape = (stop - start, *self.shape[1:])
        part.pointer += start * math.prod(self.shape[1:]) * self.dtype.itemsize
        return part

    def _copy(self, name: str, target: int, source: int, size: int) -> None:
        with _lock:
            self._driver.enter()
            self._driver.call(name, *map(ctypes.c_uint64, (target, source)), ctypes.c_size_t(size))


class CudaBackend(Backend):
    """Two streams of one device."""

    device: Device = "cuda"
    joins = False  # not measured on this device

    def __init__(self, driver: Driver, *, overlap: bool = True):
        """Creates the streams.

        Args:
            driver: driver of the device.
            overlap: lets the scorer run beside a layer; if False, it runs between two layers and
                the host waits for it, which shows what the overlap is worth.

        Raises:
            DeviceError: the driver refuses.
        """
        super().__init__()
        prepare_cuda()
        self.lock = _lock
        self.driver, self.overlap = driver, overlap
        self.layers, self.scorer = driver.new_stream(), driver.new_stream()
        self.run_options = onnxruntime().RunOptions()
        self.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """See `Backend`."""
        return CudaBuffer(shape, dtype, self.driver)

    def session(self, graph: Path | bytes, *, scorer: bool = False, **options: Any) -> Any:
        """See `Backend`."""
        stream = self.scorer if scorer and self.overlap else self.layers
        return create_session(graph, self.device, stream.value, **options)

    def asynchronous(self, run: Run, output: Buffer) -> AsyncRun:
        """See `Backend`."""
        return _CudaRun(self, run, output) if self.overlap else AsyncRun(run, output)

    def synchronize(self) -> None:
        """See `Backend`."""
        self.driver.enter()
        self.driver.call("cuStreamSynchronize", self.layers)


class _CudaRun(AsyncRun):
    """A run on the scorer's stream, once the layers called before it have written its input."""

    def __init__(self, backend: CudaBackend, run: Run, output: Buffer):
        self._backend, self._run, self._source = backend, run, output
        driver = backend.driver
        driver.enter()
        self._ready, self._fetched, host = (ctypes.c_void_p() for _ in range(3))
        self._size = ctypes.c_size_t(int(np.prod(output.shape)) * output.dtype.itemsize)
        for event in (self._ready, self._fetched):
            driver.call("cuEventCreate", ctypes.byref(event), _NO_TIMING)
        # Only a copy to page-locked memory can overlap running kernels.
        driver.call("cuMemHostAlloc", ctypes.byref(host), self._size, 0)
        self._host = host
        memory: Any = (ctypes.c_char * self._size.value).from_address(host.value or 0)
        self._result = np.frombuffer(memory, output.dtype).reshape(output.shape)
        driver.release_with(
            self,
            ("cuEventDestroy_v2", self._ready),
            ("cuEventDestroy_v2", self._fetched),
            ("cuMemFreeHost", host),
        )

    def start(self) -> None:
        """See `AsyncRun`."""
        layers, scorer = self._backend.layers, self._backend.scorer
        driver = self._backend.driver
        driver.enter()
        driver.call("cuEventRecord", self._ready, layers)
        driver.call("cuStreamWaitEvent", scorer, self._ready, 0)
        self._run()
        source = ctypes.c_uint64(self._source.pointer)
        driver.call("cuMemcpyDtoHAsync_v2", self._host, source, self._size, scorer)
        driver.call("cuEventRecord", self._fetched, scorer)

    def result(self) -> np.ndarray:
        """See `AsyncRun`."""
        self._backend.driver.call("cuEventSynchronize", self._fetched)
        return self._result
