"""Log-probabilities, their divergence, the standard error of a mean, and functions at points."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def log_softmax(logits: npt.NDArray) -> npt.NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def kl_divergence(p: npt.NDArray, q: npt.NDArray) -> npt.NDArray[np.float64]:
    """KL(p || q) in nats from log-probabilities over the last axis."""
    return (np.exp(p) * (p - q)).sum(-1)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values; 0 for a single one."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def linear(x: float, known: Sequence[int], values: Sequence[float]) -> float:
    """A function at x, from its values at some points; linear between and beyond them."""
    if len(known) == 1:
        return values[0]
    right = min(max(bisect_left(known, x), 1), len(known) - 1)
    (a, b), (low, high) = known[right - 1 : right + 1], values[right - 1 : right + 1]
    return low + (high - low) * (x - a) / (b - a)
