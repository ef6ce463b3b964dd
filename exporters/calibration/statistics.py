"""What the hidden states reveal about a layer: its figures, and the map that replaces it."""

from __future__ import annotations

import numpy as np
import torch

from dash_onnx.core.block import Block
from dash_onnx.exporters.architectures.base import Norm
from dash_onnx.exporters.calibration.hidden_states import HiddenStateFile, HiddenStates
from dash_onnx.exporters.calibration.tokens import SINK_TOKENS

_EXACT_WIDTH = 1024  # beyond this size, computing all eigenvectors takes too long
_RIDGE = 0.01  # of the mean diagonal: keeps directions rarely seen in calibration near zero


def scale_and_cosine(x: HiddenStates, y: HiddenStates) -> tuple[float, float]:
    """Means over tokens of ||y|| / ||x|| and of cos(x, y), sink tokens left out."""
    ratios, cosines = [], []
    for before, after in zip(x, y, strict=True):
        before, after = (h[SINK_TOKENS:].astype(np.float64) for h in (before, after))
        norms = np.stack([np.linalg.norm(h, axis=-1) for h in (before, after)])
        seen = (norms > 0).all(0)  # rows of embeddings that were never trained may be zero
        before_norm, after_norm = norms[:, seen]
        ratios += [*(after_norm / before_norm)]
        cosines += [*(np.sum(before * after, -1)[seen] / (before_norm * after_norm))]
    if not ratios:
        return 1.0, 1.0
    return float(np.mean(ratios)), float(np.mean(cosines))


def relative_error(output: HiddenStates, reference: HiddenStates) -> float:
    """||output - reference|| / ||reference|| over all tokens but the sinks."""
    lost = total = 0.0
    for ours, theirs in zip(output, reference, strict=True):
        wanted = theirs[SINK_TOKENS:].astype(np.float64)
        lost += float(np.square(ours[SINK_TOKENS:] - wanted).sum())
        total += float(np.square(wanted).sum())
    return (lost / total) ** 0.5


def compensation(
    x: HiddenStateFile, y: HiddenStateFile, norm: Norm | None, block: Block, scale: float, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best map of a given rank from attention's input to `y - scale * x`, sink tokens left out.

    Reduced-rank regression: the least-squares map, projected onto the leading directions of its
    predictions. K and V read the same input, so the skip graph has one product for all three; the
    norm before it bounds the output of the map, however large a hidden state grows.

    Args:
        x: input of the layer.
        y: its output.
        norm: norm before its attention.
        block: what all layers compute.
        scale: see `LayerFacts`.
        rank: rank of the map.

    Returns:
        A `[rank, D]` and B `[D, rank]` of the map B A.
    """
    gram = cross = torch.zeros(())
    for before, after in zip(x.batches(), y.batches(), strict=True):
        before, after = (h[:, SINK_TOKENS:] for h in (before, after))
        inputs = normed(before, norm, block)
        missing = torch.as_tensor(after - np.float32(scale) * before).float().flatten(0, 1)
        gram = gram + inputs.T @ inputs
        cross = cross + inputs.T @ missing
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    linear = torch.linalg.solve(gram, cross)  # [D, D], in x out
    best = _leading(cross.T @ linear, rank)  # directions of the predictions
    return (linear @ best).T.contiguous().cpu(), best.contiguous().cpu()


def _leading(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthonormal basis `[D, rank]` of the leading directions of a positive semidefinite matrix."""
    if len(matrix) <= _EXACT_WIDTH:
        return torch.linalg.eigh(matrix).eigenvectors[:, -rank:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.svd_lowrank(matrix, 2 * rank, niter=4)[0][:, :rank]


def gram_of(
    hidden: HiddenStateFile, norm: Norm | None, block: Block, held_out: int = 0
) -> torch.Tensor:
    """Sum of x x^T, `[D, D]`, over the inputs of a linear layer after a norm.

    Args:
        hidden: hidden states of all sequences.
        norm: norm before the layer.
        block: what all layers compute.
        held_out: number of leading sequences to leave out.
    """
    total = torch.zeros(())
    for part in hidden.batches(held_out):
        inputs = normed(part, norm, block)
        total = total + inputs.T @ inputs
    return total


def normed(hidden: HiddenStates, norm: Norm | None, block: Block) -> torch.Tensor:
    """The inputs of a linear layer after a norm, `[tokens, D]` float32."""
    x = torch.as_tensor(hidden).float().flatten(0, 1)
    return x if norm is None else norm(x, block)
