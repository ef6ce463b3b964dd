"""The K/V cache of a sequence: two buffers a layer, updated in place, grown by doubling."""

from __future__ import annotations

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
        moves: how often the buffers have moved; whoever is bound to them must follow.
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
        self.moves = 0
        self._manifest = manifest
        self._backend = backend
        self.keys: list[Buffer] = []
        self.values: list[Buffer] = []
        self.reserve(min(capacity, manifest.model.max_length))

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` in all; the buffers may move for it."""
        if tokens <= self.capacity:
            return
        capacity = self.capacity or tokens
        while capacity < tokens:
            capacity *= 2
        capacity = min(capacity, self._manifest.model.max_length)
        # All of them before the first is taken: there may be no memory for the last.
        keys, values = self._grown(self.keys, capacity), self._grown(self.values, capacity)
        self.rotary = [self._tables(rope, capacity) for rope in self._manifest.ropes]
        self.keys, self.values, self.capacity = keys, values, capacity
        self.moves += 1

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
                valid = (slice(None), slice(None), slice(self.length))
                buffer.write(old[layer].array[valid], valid)
            new.append(buffer)
        return new

    def truncate(self, length: int) -> None:
        """Forgets all tokens from position `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} tokens to {length}")
        self.length = length


class KVPart(KVCache):
    """Some sequences of a cache, as long as they are themselves; what is in it stays in there."""

    def __init__(self, whole: KVCache, start: int, stop: int):
        """Takes the sequences `start` to `stop`."""
        self.batch = stop - start
        self._whole, self._rows, self._length = whole, (start, stop), 0
        self.capacity = 0
        self._follow()

    @property
    def length(self) -> int:
        """Valid tokens of each sequence."""
        return self._length

    @length.setter
    def length(self, tokens: int) -> None:
        self._length = tokens
        self._whole.length = max(self._whole.length, tokens)  # what is kept when it grows

    def reserve(self, tokens: int) -> None:
        """See `KVCache`; the whole cache grows."""
        self._whole.reserve(tokens)
        self._follow()

    def _follow(self) -> None:
        whole = self._whole
        if self.capacity == whole.capacity:
            return
        self.keys = [buffer.part(*self._rows) for buffer in whole.keys]
        self.values = [buffer.part(*self._rows) for buffer in whole.values]
        self.rotary, self.capacity, self.moves = whole.rotary, whole.capacity, whole.moves
