"""Text that a model writes itself, sampled at temperature 1, for calibration and for training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

NextLogits: TypeAlias = Callable[[torch.Tensor, int], torch.Tensor]
"""Tokens `[n, 1]` at a position of their sequences -> logits `[n, V]` of those that follow."""

DOCUMENT_TOKEN = "<|endoftext|>"
"""What separates documents in the training text of most models with a byte-level BPE."""


@torch.inference_mode()
def sample_tokens(
    next_logits: NextLogits,
    first: torch.Tensor,
    length: int,
    generator: torch.Generator,
    on_token: Callable[[], object],
) -> torch.Tensor:
    """Writes sequences side by side.

    Args:
        next_logits: the model, called for one position after the other.
        first: `[n]`, the token that each sequence begins with.
        length: tokens of a sequence, the first included.
        generator: of what is drawn; the global random state stays as it is.
        on_token: called after each position.

    Returns:
        Token ids `[n, length]`.
    """
    ids = torch.empty(len(first), length, dtype=torch.int64)
    ids[:, 0] = first
    for position in range(length - 1):
        logits = next_logits(ids[:, position : position + 1], position)
        # By the inverse of the distribution function: torch.multinomial is ten times slower.
        heights = logits.float().softmax(-1).cumsum(-1)
        draws = torch.rand(len(heights), 1, generator=generator) * heights[:, -1:]
        drawn = torch.searchsorted(heights, draws).clamp(max=heights.shape[-1] - 1)
        ids[:, position + 1] = drawn[:, 0]
        on_token()
    return ids
