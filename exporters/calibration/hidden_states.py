"""Hidden states of the calibration tokens, on disk: they outlive the process and take no memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

HiddenStates = npt.NDArray[np.floating]
"""`[sequences, length, D]`."""

BATCH = 8
"""Sequences that are in memory at a time."""


@dataclass(frozen=True)
class HiddenStateFile:
    """Hidden states `[sequences, length, D]` in a file of NumPy's format."""

    path: Path

    def write(self, sequences: int, batches: Iterable[HiddenStates]) -> None:
        """Writes `sequences` sequences, which come a few at a time."""
        self.path.unlink(missing_ok=True)
        for batch in batches:
            self.append(sequences, batch)

    def append(self, sequences: int, batch: HiddenStates) -> None:
        """Writes some of `sequences` sequences behind those that the file holds."""
        # Not through a map of the file: where the disk is full, writing to one ends the process.
        with self.path.open("ab") as file:
            if not file.tell():
                shape = (sequences, *batch.shape[1:])
                header = {"descr": batch.dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(batch).data)

    def __getitem__(self, sequences: slice) -> HiddenStates:
        """Reads some sequences."""
        # A copy, so that the file is mapped only while it is read.
        return np.array(np.load(self.path, mmap_mode="r")[sequences])

    def __len__(self) -> int:
        """How many sequences there are."""
        return int(np.load(self.path, mmap_mode="r").shape[0])

    def batches(self, first: int = 0) -> Iterator[HiddenStates]:
        """Batches of a few sequences, in order, starting at a given one."""
        for start in range(first, len(self), BATCH):
            yield self[start : start + BATCH]
