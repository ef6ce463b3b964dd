"""The K/V cache of one sequence: two buffers a layer, updated in place, grown by doubling."""

from __future__ import annotations

import numpy as np

from dash_onnx.core.facts import Rope
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.rope import rotary_tables
from dash_onnx.runtime.backend import Backend
from dash_onnx.runtime.buffers import Buffer

CAPACITY = 256
"""Tokens there is room for at first: most chat turns fit, and a copy of this size costs nothing."""


class KVCache:
    """Keys and values of every layer.

    Attributes:
        batch: sequences B, equally long.
        length: valid tokens of each.
        capacity: tokens there is room for.
        keys: one buffer `[B, H_kv, capacity, d]` per layer, see `Dims.cache_shape`.
        values: likewise.
        rotary: cosine and sine `[capacity, rotary_dim / 2]` of each rotary embedding.
    """

    def __init__(
        self, manifest: Manifest, backend: Backend, capacity: int = CAPACITY, batch: int = 1
    ):
        """Starts empty, with room for some tokens."""
        self.batch = batch
        self.length = 0
        self.capacity = 0
        self._manifest = manifest
        self._backend = backend
        self.keys: list[Buffer] = []
        self.values: list[Buffer] = []
        self.reserve(min(capacity, manifest.model.max_length))

    def reserve(self, tokens: int) -> bool:
        """Makes room for `tokens` in all; returns whether the buffers had to move for it."""
        if tokens <= self.capacity:
            return False
        capacity = self.capacity or tokens
        while capacity < tokens:
            capacity *= 2
        capacity = min(capacity, self._manifest.model.max_length)
        self.keys = self._grown(self.keys, capacity)
        self.values = self._grown(self.values, capacity)
        self.rotary = [self._tables(rope, capacity) for rope in self._manifest.ropes]
        self.capacity = capacity
        return True

    def _tables(self, rope: Rope, capacity: int) -> tuple[Buffer, Buffer]:
        dtype = self._manifest.dims.dtype
        tables = rotary_tables(rope, capacity, dtype)
        cos, sin = (self._backend.buffer(table.shape, dtype) for table in tables)
        cos.write(tables[0])
        sin.write(tables[1])
        return cos, sin

    def _grown(self, old: list[Buffer], capacity: int) -> list[Buffer]:
        dims = self._manifest.dims
        shape = dims.cache_shape(self.batch, capacity)
        new = []
        for layer in range(self._manifest.model.num_layers):
            buffer = self._backend.buffer(shape, dims.cache_dtype)
            if self.length:
                content = np.zeros(shape, dims.cache_dtype)
                content[:, :, : self.length] = old[layer].array[:, :, : self.length]
                buffer.write(content)
            new.append(buffer)
        return new

    def truncate(self, length: int) -> None:
        """Forgets all tokens from position `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} tokens to {length}")
        self.length = length
