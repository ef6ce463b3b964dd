"""Drawing tokens from a distribution over the whole vocabulary."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

DOCUMENT_TOKEN = "<|endoftext|>"
"""What separates documents in the training text of most models with a byte-level BPE."""


def drawn(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One index per row of `[n, V]`, as `[n, 1]`.

    By the inverse of the distribution function: torch.multinomial is ten times slower.
    """
    heights = probabilities.cumsum(-1)
    draws = torch.rand(len(heights), 1, generator=generator) * heights[:, -1:]
    return torch.searchsorted(heights, draws).clamp(max=heights.shape[-1] - 1)


class Sample(LogitsProcessor):
    """Makes greedy search in transformers a sampling at temperature 1."""

    def __init__(self, generator: torch.Generator):
        """Draws with a generator of its own: the global random state stays as it is."""
        self._generator = generator

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `[n, V]` -> 0 for the token drawn, minus infinity for all others."""
        tokens = drawn(scores.float().softmax(-1), self._generator)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens, 0.0)
