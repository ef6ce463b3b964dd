"""Sampling: from logits to the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dash_onnx.errors import PolicyError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The penalty comes first, then temperature and filters.

    Attributes:
        temperature: 0 is greedy.
        repetition_penalty: logits of tokens seen before are divided (multiplied when negative)
            by it; 1 is off (CTRL, arXiv 1909.05858).
        top_k: keep the k most likely tokens; 0 is off.
        top_p: keep the most likely tokens that together reach this probability; 1 is off.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 is off.
        seed: None draws differently each time.
    """

    temperature: float = 0.0
    repetition_penalty: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(0 <= self.temperature < np.inf, "temperature", self.temperature, "at least 0")
        _require(self.seed is None or self.seed >= 0, "seed", self.seed, "at least 0")
        _require(
            0 < self.repetition_penalty < np.inf,
            "repetition_penalty",
            self.repetition_penalty,
            "more than 0",
        )
        _require(self.top_k >= 0, "top_k", self.top_k, "at least 0")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")


class Sampler:
    """Draws the tokens of one generation."""

    def __init__(self, sampling: Sampling):
        """Seeds the generator."""
        self._sampling = sampling
        self._rng = np.random.default_rng(sampling.seed)

    def __call__(self, logits: npt.NDArray[np.floating], seen: Sequence[int]) -> int:
        """Draws one token.

        Args:
            logits: `[V]`; left as it is.
            seen: ids of the prompt and of the answer so far, for the repetition penalty.
        """
        options = self._sampling
        if options.repetition_penalty != 1.0:
            logits = _penalized(logits, seen, options.repetition_penalty)
        if options.temperature == 0:
            return int(np.argmax(logits))
        ids = np.arange(len(logits))
        if 0 < options.top_k < len(logits):
            ids = np.argpartition(-logits, options.top_k - 1)[: options.top_k]
        with np.errstate(over="ignore"):  # a tiny temperature is nearly greedy
            logits = (logits[ids].astype(np.float64) - logits.max()) / options.temperature
        weights = np.exp(logits)  # 1 for the most likely
        if options.top_p < 1:
            kept = _nucleus(weights, options.top_p)
            ids, weights = ids[kept], weights[kept]
        if options.min_p > 0:
            likely = weights >= options.min_p
            ids, weights = ids[likely], weights[likely]
        heights = np.cumsum(weights)
        drawn = np.searchsorted(heights, self._rng.random() * heights[-1], side="right")
        return int(ids[min(drawn, len(ids) - 1)])


def _nucleus(weights: npt.NDArray[np.float64], share: float) -> npt.NDArray[np.intp]:
    """Places of the largest weights that together reach a share; the one that crosses it stays."""
    total = weights.sum()
    # All that are smaller have less than the rest of the share together, so only a few are sorted.
    large = np.flatnonzero(weights >= (1 - share) * total / len(weights))
    order = large[np.argsort(-weights[large], kind="stable")]
    reached = np.searchsorted(np.cumsum(weights[order]) / total, share)
    return order[: int(reached) + 1]


def _penalized(
    logits: npt.NDArray[np.floating], seen: Sequence[int], penalty: float
) -> npt.NDArray[np.floating]:
    logits = logits.copy()
    ids = np.unique(np.asarray(seen, np.int64))
    chosen = logits[ids]
    logits[ids] = np.where(chosen > 0, chosen / penalty, chosen * penalty)
    return logits


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise PolicyError(f"{name}={value} is not allowed; it must be {wanted}")
