"""What a sequence keeps: K/V, updated in place and grown in steps, and states of fixed size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dash_onnx.core.facts import Rope
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.rope import rotary_tables
from dash_onnx.runtime.backend import Backend
from dash_onnx.runtime.buffers import Buffer
from dash_onnx.runtime.states import States, exchange

CAPACITY = 256
"""Initial capacity in tokens, and the step that it grows by: attention from plain operators
computes over all of it."""

_SETTLED = 64
"""Tokens that a choice of attention holds for: choosing takes as long as a small operator."""


class KVCache:
    """Keys and values of every layer that has its own, and the states of layers that keep some.

    Attributes:
        batch: number of sequences B, of equal length.
        length: valid tokens of each.
        capacity: tokens there is room for.
        moves: how often the buffers have moved; bindings to them must then be renewed.
        keys: by layer, a buffer `[B, H_kv, capacity, d]`, see `Dims.cache_shape`.
        values: by layer, as `keys`.
        states: states of layers without K/V; None if there are none.
        rotary: cosine and sine `[capacity, rotary_dim / 2]` of each rotary embedding.
        masks: by window, `[B, 1, 1, 1, capacity]` float32 for a pass of one token each: zero for
            tokens that it sees, minus infinity for others.
        plain: whether such a pass attends by plain operators, bool scalar; see `settle`.
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
        self.keys: dict[int, Buffer] = {}
        self.values: dict[int, Buffer] = {}
        self.states = States(manifest, backend, batch) if manifest.recurrence else None
        self.masks: dict[int | None, Buffer] = {}
        self._windows = {attention.window for attention in manifest.attention}
        self.plain = Buffer((), "bool")
        self._settled = range(0)  # lengths that `plain` holds for
        self.reserve(min(capacity, manifest.model.max_length))

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` in total, at most for the context; the buffers may move."""
        steps = -(-tokens // CAPACITY) * CAPACITY if self.capacity else tokens
        capacity = min(steps, self._manifest.model.max_length)
        if capacity <= self.capacity or tokens <= self.capacity:
            return
        # Allocates all before replacing any: memory may run out at the last.
        keys, values = self._grown(self.keys, capacity), self._grown(self.values, capacity)
        self.rotary = [self._tables(rope, capacity) for rope in self._manifest.ropes]
        masks = {window: self._mask(window, capacity) for window in self._windows}
        self.keys, self.values, self.masks, self.capacity = keys, values, masks, capacity
        self._settled = range(0)
        self.moves += 1

    def _mask(self, window: int | None, capacity: int) -> Buffer:
        mask = Buffer((self.batch, 1, 1, 1, capacity), "float32")  # no other device reads it
        if self.capacity:
            mask.write(-np.inf)
            mask.write(self.masks[window].array, (..., slice(self.capacity)))
        return mask

    def _tables(self, rope: Rope, capacity: int) -> tuple[Buffer, Buffer]:
        dtype = self._manifest.dims.dtype
        tables = rotary_tables(rope, capacity, dtype)
        cos, sin = (self._backend.buffer(table.shape, dtype) for table in tables)
        cos.write(tables[0])
        sin.write(tables[1])
        return cos, sin

    def _grown(self, old: dict[int, Buffer], capacity: int) -> dict[int, Buffer]:
        new = {}
        for layer in self._manifest.attending:
            dims = self._manifest.dims_of(layer)
            shape = dims.cache_shape(self.batch, capacity)
            buffer = self._backend.buffer(shape, dims.cache_dtype)
            if self.length:
                buffer.take(old[layer], self.length)
            new[layer] = buffer
        return new

    def settle(self, length: int) -> None:
        """Chooses the faster attention for passes of one token of each sequence.

        Args:
            length: tokens of the longest sequence that runs.
        """
        if length not in self._settled:
            passes = self._manifest.costs.passes
            faster = passes is not None and passes.attends_plainly(1, length, self.capacity)
            self.plain.write(faster)
            first = length // _SETTLED * _SETTLED
            self._settled = range(first, first + _SETTLED)

    def show(self, total: int) -> None:
        """Lets the last of `total` tokens see what its window holds."""
        for window, mask in self.masks.items():
            start = 0 if window is None else max(total - window, 0)
            mask.write(-np.inf, (..., slice(start)))
            mask.write(0.0, (..., slice(start, total)))
            mask.write(-np.inf, (..., slice(total, None)))

    def begin(self, count: int) -> None:
        """Counts the tokens of the next pass."""
        if self.states is not None:
            self.states.begin(self.length, count)
        self.length += count

    def rest(self) -> None:
        """Lets a pass run over the sequences; what it writes is ignored."""
        if self.states is not None:
            self.states.begin(self.length)

    def exchange(self, other: KVCache) -> None:
        """Swaps contents with a cache of as many sequences and the same capacity."""
        self.reserve(0)  # follows the whole cache if it has grown
        other.reserve(0)
        held = np.s_[:, :, : max(self.length, other.length)]
        for own, others in ((self.keys, other.keys), (self.values, other.values)):
            for layer, buffer in own.items():
                exchange(buffer, others[layer], held)
        if self.states is not None and other.states is not None:
            self.states.exchange(other.states)
        self.length, other.length = other.length, self.length

    def place(self, length: int) -> int:
        """The longest prefix, of at most `length` tokens, that it can roll back to."""
        return length if self.states is None else self.states.place(length, self.length)

    def truncate(self, length: int) -> int:
        """Forgets all tokens from position `length` on, or from the last place before it.

        Returns:
            Tokens that it holds now.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} tokens to {length}")
        place = self.place(length)
        if self.states is not None:
            self.states.back(place, self.length)
        self.length = place
        return place


def mask_of(
    positions: npt.NDArray[np.int64], capacity: int, window: int | None
) -> npt.NDArray[np.float32]:
    """Mask of tokens at positions `[...]` over a cache, `[..., capacity]`: 0 if seen, else -inf."""
    rows, columns = positions[..., None], np.arange(capacity)
    seen = (columns <= rows) & (columns > rows - (window or capacity))
    return np.where(seen, np.float32(0), np.float32(-np.inf))


class KVPart(KVCache):
    """Some sequences of a cache, in its memory, with their own length."""

    def __init__(self, whole: KVCache, start: int, stop: int):
        """Takes the sequences `start` to `stop`."""
        self.batch = stop - start
        self._whole, self._rows, self._length = whole, (start, stop), 0
        self.plain = whole.plain
        self.states = whole.states and whole.states.part(start, stop)
        self.moves = 0
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

    def settle(self, length: int) -> None:
        """See `KVCache`; it holds for the whole cache."""
        self._whole.settle(length)

    def _follow(self) -> None:
        whole = self._whole
        if self.moves == whole.moves:
            return
        self.keys, self.values = (
            {layer: buffer.part(*self._rows) for layer, buffer in buffers.items()}
            for buffers in (whole.keys, whole.values)
        )
        self.masks = {window: mask.part(*self._rows) for window, mask in whole.masks.items()}
        self.rotary, self.capacity, self.moves = whole.rotary, whole.capacity, whole.moves
