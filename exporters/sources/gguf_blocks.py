"""GGUF's quantized blocks as the integers, scales and offsets that MatMulNBits computes with.

Source of the layouts: ggml's block structures, as the `gguf` package's `quants` describes them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import Q4_K

from dash_onnx.exporters.quantize.blockwise import Bits, Quantized, pack_levels

BLOCK_SIZE = 32
"""Weights that share a scale, in every type below."""


def unpack(data: np.ndarray, kind: Type) -> Quantized | None:
    """Reads a weight without rounding it.

    Args:
        data: uint8 `[N, bytes of a row]`.
        kind: its GGUF type.

    Returns:
        The weight: Q4_0 and Q8_0 are symmetric, Q4_1 and Q4_K have an offset per block. None for
        types with more levels than the nearest form, and for types without integer levels.
    """
    read = _READERS.get(kind)
    return read(data) if read else None


def _q4_0(data: np.ndarray) -> Quantized:
    scales, nibbles = np.split(_blocks(data, 18), [2], -1)
    return _quantized(_halves(nibbles), _float16(scales), None, 4)


def _q4_1(data: np.ndarray) -> Quantized:
    scales, least, nibbles = np.split(_blocks(data, 20), [2, 4], -1)
    d = _float16(scales)
    return _quantized(_halves(nibbles), d, _float16(least) + 8 * d, 4)


def _q4_k(data: np.ndarray) -> Quantized:
    """Eight blocks of 32 share two FP16 numbers, which their 6-bit scales and minima multiply."""
    d, least, scales, nibbles = np.split(_blocks(data, 144), [2, 4, 16], -1)
    rows = len(data)
    factors, minima = Q4_K.get_scale_min(scales.reshape(-1, 12))
    d8 = (_float16(d)[..., None] * factors.reshape(rows, -1, 8)).reshape(rows, -1)
    m8 = (_float16(least)[..., None] * minima.reshape(rows, -1, 8)).reshape(rows, -1)
    levels = _halves(nibbles.reshape(rows, -1, 32)).reshape(rows, -1, BLOCK_SIZE)
    return _quantized(levels, d8, 8 * d8 - m8, 4)


def _q8_0(data: np.ndarray) -> Quantized:
    scales, levels = np.split(_blocks(data, 34), [2], -1)
    return _quantized(levels ^ 128, _float16(scales), None, 8)  # two's complement to level + 128


_READERS: dict[Type, Callable[[np.ndarray], Quantized]] = {
    Type.Q4_0: _q4_0,
    Type.Q4_1: _q4_1,
    Type.Q4_K: _q4_k,
    Type.Q8_0: _q8_0,
}
KEPT = frozenset(_READERS)
"""The types that `unpack` reads."""


def _blocks(data: np.ndarray, size: int) -> np.ndarray:
    return np.ascontiguousarray(data).view(np.uint8).reshape(len(data), -1, size)


def _float16(pairs: np.ndarray) -> np.ndarray:
    """Pairs of bytes to float32, which removes the last axis."""
    return np.ascontiguousarray(pairs).view("<f2")[..., 0].astype(np.float32)


def _halves(nibbles: np.ndarray) -> np.ndarray:
    """The low half-bytes of a group of bytes, then the high ones."""
    return np.concatenate([nibbles & 15, nibbles >> 4], -1)


def _quantized(
    levels: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None, bits: Bits
) -> Quantized:
    values = pack_levels(levels, bits)
    shape = (levels.shape[0], levels.shape[1] * BLOCK_SIZE)
    return Quantized(values, scales, None, shape, bits, BLOCK_SIZE, offsets)
