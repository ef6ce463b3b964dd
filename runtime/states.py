"""Fixed-size states of layers without K/V: what they hold, and the places to roll back to.

K/V are truncated by lowering their length. A state has absorbed all its tokens, so rolling back
needs a copy: what the last pass began with, and a few points that long passes left.
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
from dash_onnx.runtime.drafts import MAX_DRAFT_TOKENS

POINTS = 4
"""Most points that a sequence keeps."""

LONG = MAX_DRAFT_TOKENS + 2
"""Minimum tokens of a pass that leaves points at both ends: a prompt, not one with drafts."""

_SPACING = 512  # tokens after which a shorter pass leaves a point, too

Arrays = dict[str, npt.NDArray[Any]]
"""The states of some sequences, `[B, ...]`, by name, such as `conv.3` for layer 3."""


class States:
    """States of B sequences of one length, which may be the rows of a batch.

    A pass reads `past` and writes `present`, so it may run again, and what it writes to rows that
    it merely runs over is ignored. When the next pass begins, the present becomes the past: the two
    are swapped, or copied where rows have different lengths.

    Attributes:
        past: by name, the states that the last pass began with.
        present: by name, the states that it produced.
        start: tokens that `past` has seen.
        points: by tokens, copies of earlier pasts; none of them is after `start`.
        turn: 0 or 1: which of the two sets of buffers is the past; graphs are bound for each.
    """

    def __init__(self, manifest: Manifest, backend: Backend, batch: int):
        """Starts with zeros, the state before the first token."""
        dtype, shapes = manifest.dims.dtype, manifest.state_shapes
        self.past, self.present = (
            {name: backend.buffer((batch, *shape), dtype) for name, shape in shapes.items()}
            for _ in range(2)
        )
        self.start = 0
        self.points: dict[int, Arrays] = {}
        self.turn = 0
        self._trades = True

    def part(self, start: int, stop: int) -> States:
        """Sequences `start` to `stop`, in the same memory, with their own points."""
        part = copy(self)
        part.past = {name: buffer.part(start, stop) for name, buffer in self.past.items()}
        part.present = {name: buffer.part(start, stop) for name, buffer in self.present.items()}
        part.points = {}
        part._trades = False
        return part

    def ports(self, layer: int) -> dict[str, Buffer]:
        """The buffers that the ports of a layer are bound to."""
        found = {}
        for side, buffers in (("past", self.past), ("present", self.present)):
            for key, buffer in buffers.items():
                name, _, number = key.partition(".")
                if int(number) == layer:
                    found[f"{side}_{name}"] = buffer
        return found

    def begin(self, length: int, count: int = 0) -> None:
        """Prepares a pass of `count` tokens after `length`: the last present becomes the past."""
        before = length - self.start
        if before and self._trades:
            self.past, self.present, self.turn = self.present, self.past, 1 - self.turn
        elif before:  # at 0, that pass runs again
            self.start = -1  # no place until the copy is whole
            for name, buffer in self.present.items():
                self.past[name].write(buffer.array)
        self.start = length
        new = length - max(self.points, default=0)
        if new and (max(before, count) >= LONG or new >= _SPACING):
            self.points[length] = {name: past.array.copy() for name, past in self.past.items()}
            self._thin()

    def _thin(self) -> None:
        """Drops the point that most closely follows another place; never the last one."""
        while len(self.points) > POINTS:
            places = [0, *sorted(self.points)]
            gaps = {b: b - a for a, b in pairwise(places[:-1])}
            del self.points[min(gaps, key=lambda place: gaps[place])]

    def place(self, length: int, end: int) -> int:
        """The last place, after at most `length` tokens, that it can roll back to.

        Args:
            length: tokens.
            end: tokens that `present` has seen.
        """
        return max(place for place in (0, *self.points, self.start, end) if place <= length)

    def back(self, place: int, end: int) -> None:
        """Rolls back to a place; for the arguments see `place`."""
        self.points = {kept: arrays for kept, arrays in self.points.items() if kept <= place}
        if place != self.start and (place < end or not end):
            self._start_from(place)

    def exchange(self, other: States) -> None:
        """Swaps contents with the states of as many sequences."""
        for own, others in ((self.past, other.past), (self.present, other.present)):
            for name, buffer in own.items():
                exchange(buffer, others[name])
        self.start, other.start = other.start, self.start
        self.points, other.points = other.points, self.points

    def saved(self, end: int) -> dict[int, Arrays]:
        """Copies of one sequence's states for another, by tokens: every place up to `end`."""
        places = {**self.points}
        for place, buffers in ((self.start, self.past), (end, self.present)):
            if 0 < place <= end and place not in places:
                places[place] = {name: buffer.array.copy() for name, buffer in buffers.items()}
        return places

    def restore(self, places: Mapping[int, Arrays], length: int) -> None:
        """Restores what `saved` returned, up to one of its places."""
        self.points = {place: arrays for place, arrays in places.items() if place <= length}
        self._start_from(length)

    def _start_from(self, place: int) -> None:
        """Makes 0 or one of the points the past."""
        self.start = -1  # no place until the copy is whole
        for name, buffer in self.past.items():
            buffer.write(self.points[place][name] if place else 0)
        self.start = place


def exchange(one: Buffer, other: Buffer, where: Any = ...) -> None:
    """Swaps the contents of two buffers, or the parts of them that a NumPy index selects."""
    held = one.array[where].copy()
    one.write(other.array[where], where)
    other.write(held, where)
