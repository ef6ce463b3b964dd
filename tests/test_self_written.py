"""Text that a model writes itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dash_onnx.core.bundle import Bundle
from dash_onnx.exporters.calibration.self_written import write_text
from dash_onnx.runtime.engine import Model


def written(bundle: Path, count: int = 5, length: int = 12, seed: int = 3) -> np.ndarray:
    first = np.arange(7, 7 + count)
    return write_text(Bundle(bundle), first, length, np.random.default_rng(seed), "text")


def test_a_seed_repeats_a_text_and_another_gives_another(tiny_bundle: Path) -> None:
    ids = written(tiny_bundle)
    assert ids.shape == (5, 12)
    np.testing.assert_array_equal(ids[:, 0], np.arange(7, 12))
    np.testing.assert_array_equal(written(tiny_bundle), ids)
    assert (written(tiny_bundle, seed=4) != ids).any()
    assert (ids[0] != ids[1]).any()


def test_tokens_are_drawn_as_int8_predicts_them(tiny_bundle: Path, tiny_model: Model) -> None:
    """Of many draws after the same token, each token's share is its probability."""
    count = 3000
    ids = write_text(Bundle(tiny_bundle), np.full(count, 9), 2, np.random.default_rng(0), "text")
    logits = tiny_model.logits([9], policy="int8")[0].astype(np.float64)
    wanted = np.exp(logits - logits.max())
    wanted /= wanted.sum()
    found = np.bincount(ids[:, 1], minlength=len(wanted)) / count
    assert np.abs(found - wanted).max() < 4 * np.sqrt(wanted.max() / count)
    expected = 0.5 * np.sqrt(2 / np.pi) * np.sqrt(wanted * (1 - wanted) / count).sum()
    assert np.abs(found - wanted).sum() / 2 == pytest.approx(expected, rel=0.2)
