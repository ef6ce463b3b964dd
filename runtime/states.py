"""States of fixed size, of layers without K/V: what they hold, and the places to go back to.

K/V are forgotten by counting fewer of them. A state has seen all its tokens, so going back needs a
copy: what the last pass began with, and a few points that long passes left.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from itertools import pairwise
from typing import Any

import numpy.typing as npt

from dash_onnx.core.manifest import Manifest
from dash_onnx.runtime.backend import Backend
from dash_onnx.runtime.buffers import Buffer

POINTS = 4
"""Points that a sequence keeps."""

LONG = 17
"""Tokens of a pass that leaves points at both ends: of a prompt, not of guesses."""

_SPACING = 512  # tokens, after which shorter passes leave one, too

Arrays = dict[str, npt.NDArray[Any]]
"""By name, such as `conv.3` of layer 3, the states of some sequences, `[B, ...]`."""


class States:
    """States of B sequences of one length, which may be the rows of a batch.

    A pass reads `past` and writes `present`, so it may run again, and what it writes to rows that
    it runs over means nothing. When the next pass begins, the present becomes the past: by trading
    places, or by a copy where rows have different lengths.

    Attributes:
        past: by name, what the last pass began with.
        present: likewise, what it has made of that.
        start: tokens that `past` has seen.
        points: by tokens, what is kept of earlier pasts; none of them after `start`.
        turn: 0 or 1, which of the two memories is the past; graphs are bound to each.
    """

    def __init__(self, manifest: Manifest, backend: Backend, batch: int):
        """Begins with zeros, which have seen nothing."""
        dims = manifest.dims
        shapes = {
            f"{name}.{layer}": (batch, *shape)
            for layer, mixer in enumerate(manifest.mixers)
            for name, shape in dims.state_shapes(mixer).items()
        }
        self.past, self.present = (
            {name: backend.buffer(shape, dims.dtype) for name, shape in shapes.items()}
            for _ in range(2)
        )
        self.start = 0
        self.points: dict[int, Arrays] = {}
        self.turn = 0
        self._trades = True

    def part(self, start: int, stop: int) -> States:
        """Sequences `start` to `stop`, in the same memory, with places of their own."""
        part = copy(self)
        part.past = {name: buffer.part(start, stop) for name, buffer in self.past.items()}
        part.present = {name: buffer.part(start, stop) for name, buffer in self.present.items()}
        part.points = {}
        part._trades = False
        return part

    def ports(self, layer: int) -> dict[str, Buffer]:
        """What the ports of a layer are bound to."""
        found = {}
        for side, buffers in (("past", self.past), ("present", self.present)):
            for key, buffer in buffers.items():
                name, _, number = key.partition(".")
                if int(number) == layer:
                    found[f"{side}_{name}"] = buffer
        return found

    def begin(self, length: int, count: int = 0) -> None:
        """Before a pass of some tokens behind `length`: what the last one made is the past now."""
        before, self.start = length - self.start, length
        if before and self._trades:
            self.past, self.present, self.turn = self.present, self.past, 1 - self.turn
        elif before:  # else that pass runs again
            for name, buffer in self.present.items():
                self.past[name].write(buffer.array)
        new = length - max(self.points, default=0)
        if new and (max(before, count) >= LONG or new >= _SPACING):
            self.points[length] = {name: past.array.copy() for name, past in self.past.items()}
            self._thin()

    def _thin(self) -> None:
        """Drops the point that is closest behind another place; never the last one."""
        while len(self.points) > POINTS:
            places = [0, *sorted(self.points)]
            gaps = {b: b - a for a, b in pairwise(places[:-1])}
            del self.points[min(gaps, key=lambda place: gaps[place])]

    def place(self, length: int, end: int) -> int:
        """The last place, after at most `length` tokens, that it can go back to.

        Args:
            length: tokens.
            end: those that `present` has seen.
        """
        return max(place for place in (0, *self.points, self.start, end) if place <= length)

    def back(self, place: int, end: int) -> None:
        """Goes back to a place; arguments as of `place`."""
        self.points = {kept: arrays for kept, arrays in self.points.items() if kept <= place}
        if place in (self.start, end):
            return
        for name, buffer in self.past.items():
            buffer.write(self.points[place][name] if place else 0)
        self.start = place

    def exchange(self, other: States) -> None:
        """Trades what it holds with those of as many sequences."""
        for own, others in ((self.past, other.past), (self.present, other.present)):
            for name, buffer in own.items():
                exchange(buffer.array, others[name].array)
        self.start, other.start = other.start, self.start
        self.points, other.points = other.points, self.points

    def saved(self, end: int) -> dict[int, Arrays]:
        """Copies for another sequence, by tokens: of one sequence, every place up to `end`."""
        places = {**self.points}
        for place, buffers in ((self.start, self.past), (end, self.present)):
            if 0 < place <= end and place not in places:
                places[place] = {name: buffer.array.copy() for name, buffer in buffers.items()}
        return places

    def restore(self, places: Mapping[int, Arrays], length: int) -> None:
        """Takes what `saved` gave, up to one of its places."""
        self.points = {place: arrays for place, arrays in places.items() if place <= length}
        for name, buffer in self.past.items():
            buffer.write(places[length][name] if length else 0)
        self.start = length


def exchange(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> None:
    """Trades what two arrays hold, in place."""
    held = one.copy()
    one[...] = other
    other[...] = held
