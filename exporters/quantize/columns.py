"""INT8 with one scale for each output feature, as ORT's integer products require."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from dash_onnx.exporters.quantize.blockwise import row_groups

LEVELS = 127
"""Largest level of a weight: -128 has no positive counterpart."""


def quantize_columns(
    weight: torch.Tensor,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Rounds each output feature to the nearest level of its own scale.

    Args:
        weight: `[N, K]`, any float dtype, finite.

    Returns:
        Levels -127..127, `[K, N]`, and scales `[N]`.
    """
    rows, columns = weight.shape
    values, scales = np.empty((columns, rows), np.int8), np.empty(rows, np.float32)
    start = 0
    for part in row_groups(weight):
        each = part.float()
        stop, scale = start + len(part), each.abs().amax(1) / LEVELS
        levels = (each / torch.where(scale > 0, scale, 1.0)[:, None]).round()
        values[:, start:stop] = levels.T.numpy(force=True).astype(np.int8)
        scales[start:stop] = scale.numpy(force=True)
        start = stop
    return values, scales
