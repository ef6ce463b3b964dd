"""Sampling: from logits to the next token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dash_onnx.core.errors import PolicyError

_LARGEST = 1e30  # highest temperature: finite in FP32
_MIN_TEMPERATURE = 1e-30  # greedy, and not zero in FP32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is sampled.

    In this order, as in transformers: penalties, temperature, top-k, top-p, min-p. Each filter acts
    on the tokens that the one before it left.

    Attributes:
        temperature: 0 is greedy.
        repetition_penalty: logits of tokens seen before are divided (multiplied when negative)
            by it; 1 is off (CTRL, arXiv 1909.05858).
        frequency_penalty: subtracted from a token's logit for each time that the answer has it.
        presence_penalty: subtracted from the logits of all tokens that the answer has.
        top_k: keep the k most likely tokens; 0 is off.
        top_p: keep the most likely tokens that together reach this probability; 1 is off.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 is off.
        seed: None is random.
    """

    temperature: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(0 <= self.temperature <= _LARGEST, "temperature", self.temperature, "in 0..1e30")
        _require(self.seed is None or self.seed >= 0, "seed", self.seed, "at least 0")
        penalty = self.repetition_penalty
        _require(0.01 <= penalty <= 100, "repetition_penalty", penalty, "in 0.01..100")
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _require(-100 <= value <= 100, name, value, "in -100..100")
        _require(self.top_k >= 0, "top_k", self.top_k, "at least 0")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")


class Sampler:
    """Draws the tokens of one generation.

    Each sampled token takes one random number, however it was computed. So with a seed, drafts
    change no token that the same logits would give.
    """

    def __init__(self, sampling: Sampling, prompt_tokens: int = 0):
        """Seeds the generator; the answer follows a prompt of some tokens."""
        self._sampling = sampling
        self._rng = np.random.default_rng(sampling.seed)
        self._length, self._known = 0, set[int]()  # of the text that was seen, and its tokens
        self._ids = np.empty(0, np.int64)  # the same tokens
        self._prompt_tokens, self._counts = prompt_tokens, Counter[int]()  # in the answer

    def __call__(self, logits: npt.NDArray[np.floating], seen: Sequence[int]) -> int:
        """Draws one token.

        Args:
            logits: `[V]`; not modified.
            seen: ids of the prompt and of the answer so far, for the penalties; each call must
                extend the ids of the previous one.
        """
        options = self._sampling
        off = 1.0, 0.0, 0.0
        if (options.repetition_penalty, options.frequency_penalty, options.presence_penalty) != off:
            logits = self._penalized(logits, seen)
        if options.temperature == 0:
            return int(np.argmax(logits))
        scaled, ids = logits.astype(np.float32), None
        scaled -= scaled.max()
        if 0 < options.top_k < len(scaled):
            ids = np.argpartition(scaled, -options.top_k)[-options.top_k :]
            scaled = scaled[ids]
        with np.errstate(over="ignore"):  # a tiny temperature is nearly greedy
            scaled /= np.float32(max(options.temperature, _MIN_TEMPERATURE))
        weights = np.exp(scaled)  # 1 for the most likely
        if options.top_p < 1:
            kept = _nucleus(weights, options.top_p)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        if options.min_p > 0:
            weights[weights < options.min_p] = 0
        heights = np.cumsum(weights, dtype=np.float64)
        drawn = int(np.searchsorted(heights, self._rng.random() * heights[-1], side="right"))
        drawn = min(drawn, len(heights) - 1)
        return drawn if ids is None else int(ids[drawn])

    def _penalized(
        self, logits: npt.NDArray[np.floating], seen: Sequence[int]
    ) -> npt.NDArray[np.floating]:
        new = set(seen[self._length :]) - self._known
        self._counts.update(seen[max(self._length, self._prompt_tokens) :])
        self._length = len(seen)
        if new:
            self._known |= new
            self._ids = np.concatenate([self._ids, np.array([*new], np.int64)])
        options, logits = self._sampling, logits.copy()
        chosen, penalty = logits[self._ids], options.repetition_penalty
        logits[self._ids] = np.where(chosen > 0, chosen / penalty, chosen * penalty)
        counts = np.array([*self._counts.values()])
        logits[[*self._counts]] -= options.frequency_penalty * counts + options.presence_penalty
        return logits


def _nucleus(weights: npt.NDArray[np.floating], share: float) -> npt.NDArray[np.intp]:
    """Indices of the largest weights that together reach a share, with the one that crosses it."""
    total = weights.sum(dtype=np.float64)
    # All smaller weights together are less than the remaining share, so only a few are sorted.
    large = np.flatnonzero(weights >= (1 - share) * total / len(weights))
    order = large[np.argsort(-weights[large], kind="stable")]
    reached = np.searchsorted(np.cumsum(weights[order], dtype=np.float64) / total, share)
    return order[: int(reached) + 1]


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise PolicyError(f"{name}={value} is not allowed; it must be {wanted}")
