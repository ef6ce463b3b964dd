"""Tensors at a fixed address, so that a graph can be bound to them once and run many times."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np

from dash_onnx.runtime.ort import Device

Run = Callable[[], Any]
"""Runs a graph on the buffers that it is bound to."""


class Buffer:
    """A tensor in the CPU's memory, shared with the graphs that are bound to it.

    Attributes:
        shape: its dimensions.
        dtype: its element type.
        device: where its memory is.
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
        """Replaces the content, or the part of it that a NumPy index selects."""
        self._array[where] = content

    def take(self, other: Buffer, tokens: int) -> None:
        """Copies the first tokens of K/V `[B, H_kv, S, d]` from a cache of another capacity."""
        self._array[:, :, :tokens] = other._array[:, :, :tokens]

    def part(self, start: int, stop: int) -> Buffer:
        """Rows of the first dimension, in the same memory."""
        part = copy(self)
        part._array = self._array[start:stop]
        part.shape = part._array.shape
        part.pointer = int(part._array.ctypes.data)
        return part

    def reshaped(self, shape: tuple[int, ...]) -> Buffer:
        """The first elements in another shape, in the same memory; only on the CPU."""
        part = copy(self)
        part._array = self._array.reshape(-1)[: math.prod(shape)].reshape(shape)
        part.shape = shape
        return part
