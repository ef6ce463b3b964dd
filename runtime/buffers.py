"""Tensors at a fixed address, so that a graph can be bound to them once and run many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from dash_onnx.core.contract import Port, Ports
from dash_onnx.runtime.ort import Device, onnxruntime

Run = Callable[[], Any]
"""Runs a graph on what it is bound to."""


class Buffer:
    """A tensor on the device; on the CPU it is a NumPy array that the graphs share.

    Attributes:
        shape: its dimensions.
        dtype: its element type.
        device: where it lies.
        pointer: address of its first element on that device.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, device: Device = "cpu"):
        """Allocates zeros."""
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.device: Device = device
        self._value: Any = np.zeros(shape, self.dtype)
        if device == "cpu":
            self.pointer = int(self._value.ctypes.data)
        else:
            self._value = onnxruntime().OrtValue.ortvalue_from_numpy(self._value, device, 0)
            self.pointer = int(self._value.data_ptr())

    @property
    def array(self) -> np.ndarray:
        """The content: the shared memory itself on the CPU, a copy elsewhere."""
        return self._value if self.device == "cpu" else self._value.numpy()

    def write(self, content: Any) -> None:
        """Replaces the whole content."""
        if self.device == "cpu":
            self._value[...] = content
        else:
            self._value.update_inplace(np.ascontiguousarray(content, self.dtype))


def bind_input(
    binding: Any, port: Port, buffer: Buffer, shape: tuple[int, ...] | None = None, start: int = 0
) -> None:
    """Binds a graph input to a buffer, or to a part of it.

    Args:
        shape: of the part; None takes the whole buffer.
        start: first element of the part.
    """
    address = buffer.pointer + start * buffer.dtype.itemsize
    shape = buffer.shape if shape is None else shape
    binding.bind_input(port.name, buffer.device, 0, buffer.dtype.type, shape, address)


def bind_output(
    binding: Any, port: Port, buffer: Buffer, shape: tuple[int, ...] | None = None, start: int = 0
) -> None:
    """Binds a graph output to a buffer, or to a part of it (see `bind_input`)."""
    address = buffer.pointer + start * buffer.dtype.itemsize
    shape = buffer.shape if shape is None else shape
    binding.bind_output(port.name, buffer.device, 0, buffer.dtype.type, shape, address)


def bound_run(
    session: Any,
    ports: Ports,
    inputs: Sequence[Buffer],
    outputs: Sequence[Buffer],
    run_options: Any = None,
) -> Run:
    """Binds every port of a graph to a buffer, once; returns what runs it, again and again.

    A port whose sizes are all known takes as much of its buffer, in its own shape.
    """
    binding = session.io_binding()
    for bind, side, buffers in (
        (bind_input, ports.inputs, inputs),
        (bind_output, ports.outputs, outputs),
    ):
        for port, buffer in zip(side, buffers, strict=True):
            known = tuple(size for size in port.shape if isinstance(size, int))
            bind(binding, port, buffer, known if len(known) == len(port.shape) else None)
    run = partial(session.run_with_iobinding, binding, run_options)
    # The binding holds raw addresses: the partial must keep the buffers alive.
    run.buffers = (inputs, outputs)  # type: ignore[attr-defined]
    return run
