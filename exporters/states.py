"""Hidden states of the calibration tokens, on disk: they outlive the process and fill no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

Hidden = npt.NDArray[np.floating]
"""`[sequences, length, D]`."""

TURN = 8
"""Sequences that are in memory at a time."""


@dataclass(frozen=True)
class States:
    """Hidden states `[sequences, length, D]` in a file of NumPy's format."""

    path: Path

    def write(self, hidden: Hidden) -> None:
        """Writes states that are in memory."""
        np.save(self.path, hidden)

    def __getitem__(self, sequences: slice) -> Hidden:
        """Reads some sequences."""
        # A copy, whose file is mapped no longer than it takes.
        return np.array(np.load(self.path, mmap_mode="r")[sequences])

    def __len__(self) -> int:
        """How many sequences there are."""
        return int(np.load(self.path, mmap_mode="r").shape[0])

    @contextmanager
    def writing(self, sequences: int) -> Iterator[Writer]:
        """Opens the file for `sequences` sequences."""
        with self.path.open("wb") as file:
            yield Writer(file, sequences)

    def turns(self) -> Iterator[Hidden]:
        """A few sequences after the other."""
        for start in range(0, len(self), TURN):
            yield self[start : start + TURN]


class Writer:
    """Writes states a few sequences after the other."""

    def __init__(self, file: BinaryIO, sequences: int):
        """Knows how many will come."""
        self._file = file
        self._sequences = sequences
        self._begun = False

    def add(self, hidden: Hidden) -> None:
        """Appends sequences, `[any, length, D]`."""
        if not self._begun:
            shape = (self._sequences, *hidden.shape[1:])
            header = {"descr": hidden.dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self._file, header)
            self._begun = True
        self._file.write(np.ascontiguousarray(hidden).data)
