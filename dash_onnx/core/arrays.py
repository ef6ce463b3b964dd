"""The arrays that cross the package's boundaries."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ids: TypeAlias = npt.NDArray[np.int64]
"""Token ids, `[S]` unless stated differently."""

Logits: TypeAlias = npt.NDArray[np.float32]
"""Logits of the next token, `[V]`, or one row for each token, `[S, V]`; unless stated differently
in the type that the bundle computes in: float32, or on CUDA float16."""


def common_length(a: Ids, b: Ids) -> int:
    """Length of the prefix that two texts `[S]` share."""
    shortest = min(len(a), len(b))
    differs = np.flatnonzero(a[:shortest] != b[:shortest])
    return int(differs[0]) if len(differs) else shortest
