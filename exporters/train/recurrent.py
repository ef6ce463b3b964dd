"""Layers that do not attend, in torch: what a token gives, and how its layer mixes the tokens.

Shapes: B sequences, T tokens each, D hidden size. Tensors are float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

F = torch.nn.functional
Tensor = torch.Tensor


def own_and_kept(projected: Tensor) -> tuple[Tensor, Tensor]:
    """From a token's input projection `[..., 3 * D]`.

    Returns:
        The factor on the convolution's result, `[..., D]`, which no other token reads, and what the
        convolution reads, `[..., D]`.
    """
    before, x, own = projected.chunk(3, -1)
    return own, before * x


def kept_of(projected: Tensor) -> Tensor:
    """What the convolution reads, `[..., D]`, from the rows that a skip has, `[..., 2 * D]`."""
    before, x = projected.chunk(2, -1)
    return before * x


def mixed(own: Tensor, kept: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
    """What the output projection reads, `[B, T, D]`; weights of the convolution by name."""
    return own * convolved(kept, vectors["conv"], vectors.get("conv.bias"))


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The causal convolution of `[B, T, channels]` by `[channels, 1, kernel]`."""
    behind = F.pad(x.transpose(1, 2).float(), (weight.shape[-1] - 1, 0))
    return F.conv1d(behind, weight, bias, groups=len(weight)).transpose(1, 2)
