"""Tensors at a fixed address, so that a graph can be bound to them once and run many times."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import numpy as np

from dash_onnx.core.contract import Port, Ports
from dash_onnx.core.errors import DeviceError, first_line
from dash_onnx.runtime.ort import Device

Run = Callable[[], Any]
"""Runs a graph on what it is bound to."""


class Buffer:
    """A tensor in the CPU's memory, shared with the graphs that are bound to it.

    Attributes:
        shape: its dimensions.
        dtype: its element type.
        device: where it lies.
        pointer: address of its first element on that device.
    """

    device: Device = "cpu"

    def __init__(self, shape: tuple[int, ...], dtype: str):
        """Allocates zeros."""
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._array = np.zeros(shape, self.dtype)
        self.pointer = int(self._array.ctypes.data)

    @property
    def array(self) -> np.ndarray:
        """The content: the memory itself on the CPU, a copy elsewhere."""
        return self._array

    def write(self, content: Any, where: Any = ...) -> None:
        """Replaces the content, or the part of it that NumPy's index names."""
        self._array[where] = content

    def part(self, start: int, stop: int) -> Buffer:
        """Rows of the first dimension, in the same memory."""
        part = copy(self)
        part._array = self._array[start:stop]
        part.shape = part._array.shape
        part.pointer = int(part._array.ctypes.data)
        return part

    def reshaped(self, shape: tuple[int, ...]) -> Buffer:
        """The first elements in another shape, in the same memory; of the CPU's alone."""
        part = copy(self)
        part._array = self._array.reshape(-1)[: math.prod(shape)].reshape(shape)
        part.shape = shape
        return part


def bind(
    bind_port: Callable[..., None],
    port: Port,
    buffer: Buffer,
    shape: tuple[int, ...] | None = None,
    start: int = 0,
) -> None:
    """Binds a port of a graph to a buffer, or to a part of it.

    Args:
        bind_port: `bind_input` or `bind_output` of an IOBinding.
        port: of the graph.
        buffer: to read from or to write to.
        shape: of the part; None takes the whole buffer.
        start: first element of the part.
    """
    address = buffer.pointer + start * buffer.dtype.itemsize
    shape = buffer.shape if shape is None else shape
    bind_port(port.name, buffer.device, 0, buffer.dtype.type, shape, address)


def bound_run(
    session: Any,
    ports: Ports,
    inputs: Sequence[Buffer],
    outputs: Sequence[Buffer],
    run_options: Any = None,
) -> Run:
    """Binds every port of a graph to a buffer, once; returns what runs it, again and again.

    A port whose sizes are all known takes as much of its buffer, in its own shape. What runs raises
    a DeviceError where ORT fails, such as for a device without free memory.
    """
    binding = session.io_binding()
    for bind_port, side, buffers in (
        (binding.bind_input, ports.inputs, inputs),
        (binding.bind_output, ports.outputs, outputs),
    ):
        for port, buffer in zip(side, buffers, strict=True):
            known = tuple(size for size in port.shape if isinstance(size, int))
            bind(bind_port, port, buffer, known if len(known) == len(port.shape) else None)

    def run() -> None:
        try:
            session.run_with_iobinding(binding, run_options)
        except Exception as error:  # ORT raises types of its C extension, without a common base
            raise DeviceError(f"ONNX Runtime cannot run a graph: {first_line(error)}") from None

    # The binding holds raw addresses: the function must keep the buffers alive.
    run.buffers = (inputs, outputs)  # type: ignore[attr-defined]
    return run
