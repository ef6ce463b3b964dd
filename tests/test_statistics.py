"""The map that replaces a skipped layer, fitted to its hidden states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LLAMA_BLOCK

from dash_onnx.exporters.calibration.hidden_states import HiddenStateFile
from dash_onnx.exporters.calibration.statistics import compensation
from dash_onnx.exporters.calibration.tokens import SINK_TOKENS

RANK = 32


@pytest.mark.parametrize("width", [96, 1100])  # all directions are computed, or only the leading
def test_the_compensation_is_the_best_map_of_its_rank(width: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    factors = np.arange(1, width + 1) ** -0.5
    layer = generator.normal(size=(width, width)) / np.sqrt(width) * factors
    x = generator.normal(size=(3, width, width)).astype(np.float32)
    y = (x + x @ layer).astype(np.float32)
    files = [HiddenStateFile(tmp_path / name) for name in "xy"]
    for file, states in zip(files, (x, y), strict=True):
        file.write(3, [states])

    state = torch.get_rng_state()
    first, second = (compensation(*files, None, LLAMA_BLOCK, 1.0, RANK) for _ in "ab")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, second))

    down, up = (part.double().numpy() for part in first)
    assert (down.shape, up.shape) == ((RANK, width), (width, RANK))
    tokens = x[:, SINK_TOKENS:].reshape(-1, width).astype(np.float64)
    wanted = tokens @ layer
    left = np.square(wanted - tokens @ down.T @ up.T).sum()
    least = np.square(np.linalg.svd(wanted, compute_uv=False)[RANK:]).sum()
    assert least <= left < 1.002 * least
