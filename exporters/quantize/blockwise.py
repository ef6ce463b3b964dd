"""Blockwise round-to-nearest quantization in the layout of ORT's MatMulNBits.

Source: the operator's specification, onnxruntime docs/ContribOperators.md (com.microsoft).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

Bits = Literal[2, 4, 8]

_GROUP = 1 << 24  # weights converted to FP32 at a time, for heads of large vocabularies


class Matrix(Protocol):
    """A weight `[N, ...]` whose rows can be sliced: a tensor, or one that stays in its file."""

    @property
    def shape(self) -> Sequence[int]:
        """Shape with all rows."""
        ...

    def __getitem__(self, rows: slice, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Quantized:
    """A weight `[N, K]` as integers with one scale per block of K.

    Attributes:
        values: uint8 `[N, blocks, block_size * bits / 8]`; packed into bytes from the low bits.
        scales: float32 `[N, blocks]`.
        zero_points: uint8 `[N, blocks * bits / 8]` (rounded up), or None for 2**(bits - 1).
        offsets: float32 `[N, blocks]`, added to every weight of a block, or None.
        shape: `(N, K)`; the last block of a row is padded if K is not a multiple of the block size.
    """

    values: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.uint8] | None
    shape: tuple[int, int]
    bits: Bits
    block_size: int
    offsets: npt.NDArray[np.float32] | None = None

    def map(self, change: Callable[[npt.NDArray], npt.NDArray]) -> Quantized:
        """Applies a reordering of rows to every array."""
        return replace(
            self,
            values=change(self.values),
            scales=change(self.scales),
            zero_points=None if self.zero_points is None else change(self.zero_points),
            offsets=None if self.offsets is None else change(self.offsets),
        )


def quantize(weight: torch.Tensor, bits: Bits, block_size: int) -> Quantized:
    """Rounds to the nearest level: INT8 symmetric, others with an integer zero point per block.

    INT8 uses levels -127..127, so that weights that were INT8 with the same blocks before (GGUF
    Q8_0) are restored exactly.

    Args:
        weight: `[N, K]`, any float dtype, finite.
        bits: 2, 4 or 8.
        block_size: a power of two, at least 16 (MatMulNBits).
    """
    parts = (_rounded(rows, bits, block_size) for rows in row_groups(weight))
    return concatenate(parts, len(weight))


def row_groups(weight: Matrix) -> Iterator[torch.Tensor]:
    """Groups of rows of a weight `[N, ...]`, each small enough to copy as FP32."""
    each = max(_GROUP // max(math.prod(weight.shape[1:]), 1), 1)
    for start in range(0, max(weight.shape[0], 1), each):
        yield weight[start : start + each]


def _rounded(weight: torch.Tensor, bits: Bits, block_size: int) -> Quantized:
    blocks = blocks_of(weight.float(), block_size)  # [N, B, block_size]
    if bits == 8:
        scales = blocks.abs().amax(-1) / 127
        levels = _divide(blocks, scales).round() + 128
        shape = (weight.shape[0], weight.shape[1])
        values = levels.numpy(force=True).astype(np.uint8)
        return Quantized(values, scales.numpy(force=True), None, shape, bits, block_size)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    top = 2**bits - 1
    scales = (high - low) / top
    zeros = _divide(-low[..., None], scales)[..., 0].round().clamp(0, top)
    levels = (_divide(blocks, scales).round() + zeros[..., None]).clamp(0, top)
    return packed(levels.flatten(1)[:, : weight.shape[1]], scales, zeros, bits, block_size)


def packed(
    levels: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: Bits,
    block_size: int,
) -> Quantized:
    """Packs levels `0..2**bits - 1`.

    Args:
        levels: `[N, K]`.
        scales: `[N, blocks]`.
        zeros: `[N, blocks]`, levels of the zero points; None for `2**(bits - 1)`.
        bits: bits per level.
        block_size: levels that share a scale.
    """
    return Quantized(
        values=pack_levels(blocks_of(levels, block_size).numpy(force=True).astype(np.uint8), bits),
        scales=scales.numpy(force=True),
        zero_points=None
        if zeros is None
        else pack_levels(zeros.numpy(force=True).astype(np.uint8), bits),
        shape=(levels.shape[0], levels.shape[1]),
        bits=bits,
        block_size=block_size,
    )


def concatenate(parts: Iterable[Quantized], rows: int) -> Quantized:
    """Stacks the rows of several weights of the same form.

    Args:
        parts: the weights, possibly lazy, so that they need not exist at once.
        rows: total number of rows.
    """
    parts = iter(parts)
    first = next(parts)
    if first.shape[0] == rows:
        return first
    names = ("values", "scales", "zero_points", "offsets")
    found = {name: array for name in names if (array := getattr(first, name)) is not None}
    arrays: dict[str, Any] = {
        name: np.empty((rows, *one.shape[1:]), one.dtype) for name, one in found.items()
    }
    start = 0
    for part in chain([first], parts):
        stop = start + part.shape[0]
        for name, array in arrays.items():
            array[start:stop] = getattr(part, name)
        start = stop
    return replace(first, shape=(rows, first.shape[1]), **arrays)


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns the weight `[N, K]` that the integers stand for, converting a few rows at a time."""
    rows, columns = quantized.shape
    each = max(_GROUP // max(columns, 1), 1)
    if rows <= each:
        return _dequantized(quantized, slice(None)).to(dtype)
    result = torch.empty(rows, columns, dtype=dtype)
    for start in range(0, rows, each):
        part = slice(start, start + each)
        result[part] = _dequantized(quantized, part)
    return result


def _dequantized(whole: Quantized, rows: slice) -> torch.Tensor:
    quantized = whole.map(lambda array: array[rows])
    levels, zeros = torch.tensor(quantized.values), quantized.zero_points
    if quantized.bits < 8:
        shifts = range(0, 8, quantized.bits)
        mask = 2**quantized.bits - 1
        levels = torch.stack([(levels >> shift) & mask for shift in shifts], -1).flatten(2)
    blocks = levels[..., : quantized.block_size].float()
    if zeros is None:
        blocks -= 2 ** (quantized.bits - 1)
    else:
        offsets = unpack_levels(zeros, quantized.bits, quantized.scales.shape[1]).astype(np.float32)
        blocks -= torch.as_tensor(offsets)[..., None]
    blocks *= torch.tensor(quantized.scales)[..., None]
    if quantized.offsets is not None:
        blocks += torch.tensor(quantized.offsets)[..., None]
    return blocks.flatten(1)[:, : quantized.shape[1]].contiguous()


def pack_levels(values: npt.NDArray[np.uint8], bits: Bits) -> npt.NDArray[np.uint8]:
    """Packs neighbours on the last axis into bytes from the low bits; the last byte is padded."""
    each = 8 // bits
    if missing := -values.shape[-1] % each:
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])
    result = values[..., 0::each].copy()
    for number in range(1, each):
        result |= values[..., number::each] << np.uint8(number * bits)
    return result


def unpack_levels(found: npt.NDArray[np.uint8], bits: Bits, count: int) -> npt.NDArray[np.uint8]:
    """Inverse of `pack_levels`; `count` is the length of the last axis before packing."""
    values = np.stack([(found >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1)
    return values.reshape(*found.shape[:-1], -1)[..., :count]


def blocks_of(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """`[N, K]` -> `[N, blocks, block_size]`, the last one padded with zeros."""
    padding = -weight.shape[1] % block_size
    if padding:
        weight = torch.nn.functional.pad(weight, (0, padding))
    return weight.reshape(weight.shape[0], -1, block_size)


def _divide(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Divides by the scale of the block; an all-zero block stays zero."""
    return blocks / torch.where(scales > 0, scales, torch.ones_like(scales))[..., None]
