"""Rotary tables: cosine and sine of every position, computed from the manifest's frequencies."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dash_onnx.core.facts import Rope


def rotary_tables(
    rope: Rope, length: int, dtype: str, start: int = 0
) -> tuple[npt.NDArray, npt.NDArray]:
    """Returns cos and sin `[length, rotary_dim / 2]` in `dtype`, of positions from `start` on.

    Angles are computed in float32, as transformers does.
    """
    positions = np.arange(start, start + length, dtype=np.float32)[:, None]
    angles = positions * np.asarray(rope.inv_freq, np.float32)[None, :]
    scaling = np.float32(rope.attention_scaling)
    return (np.cos(angles) * scaling).astype(dtype), (np.sin(angles) * scaling).astype(dtype)
