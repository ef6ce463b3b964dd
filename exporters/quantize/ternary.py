"""Weights with the values -s, 0 and s, which any bit width holds exactly."""

from __future__ import annotations

from itertools import chain

import torch

from dash_onnx.exporters.quantize.blockwise import (
    Bits,
    Quantized,
    blocks_of,
    concatenate,
    packed,
    row_groups,
)


def ternary(weight: torch.Tensor, bits: Bits, block_size: int) -> Quantized | None:
    """Packs a weight without rounding it, symmetric around zero.

    Args:
        weight: `[N, K]`, any float dtype.
        bits: bits per level.
        block_size: weights of a row that share s.

    Returns:
        None if a block has a value other than its -s, 0 and s.
    """
    columns, middle, parts = weight.shape[1], 2 ** (bits - 1), []
    # The first row is tested alone first: it identifies most weights that are not ternary.
    for rows in chain([weight[:1]], row_groups(weight)):
        blocks = blocks_of(rows.float(), block_size)
        scales, signs = blocks.abs().amax(-1), blocks.sign()
        if not torch.equal(signs * scales[..., None], blocks):
            return None
        levels = (signs + middle).flatten(1)[:, :columns]
        parts.append(packed(levels, scales, None, bits, block_size))
    return concatenate(parts[1:], len(weight))
