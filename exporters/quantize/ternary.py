"""Weights of three values, -s, 0 and s, which every number of bits holds exactly."""

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
        bits: of a level.
        block_size: weights of a row that share s.

    Returns:
        None where a block has a value other than its -s, 0 and s.
    """
    columns, middle, parts = weight.shape[1], 2 ** (bits - 1), []
    # The first row comes first alone: weights that are not ternary are told by it.
    for rows in chain([weight[:1]], row_groups(weight)):
        blocks = blocks_of(rows.float(), block_size)
        scales, signs = blocks.abs().amax(-1), blocks.sign()
        if not torch.equal(signs * scales[..., None], blocks):
            return None
        levels = (signs + middle).flatten(1)[:, :columns]
        parts.append(packed(levels, scales, None, bits, block_size))
    return concatenate(parts[1:], len(weight))
