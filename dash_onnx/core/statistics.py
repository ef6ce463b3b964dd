"""Log-probabilities, their divergence, and the standard error of a mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def log_softmax(logits: npt.NDArray) -> npt.NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return result


def kl_divergence(p: npt.NDArray, q: npt.NDArray) -> npt.NDArray[np.float64]:
    """KL(p || q) in nats from log-probabilities over the last axis."""
    result: npt.NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1)
    return result


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values; 0 for a single one."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
