"""The arrays that cross the package's borders."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ids: TypeAlias = npt.NDArray[np.int64]
"""Token ids, `[S]` unless said otherwise."""

Logits: TypeAlias = npt.NDArray[np.float32]
"""Logits of the next token, `[V]`, or one row for each token, `[S, V]`."""
