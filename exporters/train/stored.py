"""Weights stored in the graphs of a bundle, as torch tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dash_onnx.core.actions import Action
from dash_onnx.core.facts import Target
from dash_onnx.exporters.architectures.base import Linear, Norm
from dash_onnx.exporters.graphs.graph import BITS, OFFSETS, weight_precision
from dash_onnx.exporters.quantize.blockwise import Bits, Quantized, dequantize


@dataclass(frozen=True)
class StoredLinear(Linear):
    """A linear layer as a graph holds it.

    Attributes:
        block_size: inputs that share a scale of the quantized weight; 0 if it is not quantized.
    """

    block_size: int = 0


def norm_of(found: dict[str, np.ndarray], name: str) -> Norm:
    """A norm in float32."""
    return Norm(torch.tensor(found[name]).float(), _bias(found, name, torch.float32))


def _bias(found: dict[str, np.ndarray], name: str, dtype: torch.dtype) -> torch.Tensor | None:
    bias = found.get(f"{name}.bias")
    return None if bias is None else torch.tensor(bias).flatten().to(dtype)


def projections_of(
    found: dict[str, np.ndarray], target: Target, dtype: torch.dtype, action: Action
) -> dict[str, StoredLinear]:
    """The linear layers of an action's graph."""
    block_size = target.block_size
    projections = {}
    for key, array in found.items():
        (name, _, part), size = key.rpartition("."), 0
        if part == "weight":
            parts = [array]
            while (more := found.get(f"{key}.{len(parts)}")) is not None:
                parts.append(more)
            if array.ndim == 3:  # experts, `[E, N, K]`
                weight = torch.as_tensor(array.copy()).flatten(0, 1).float()
            else:
                weight = torch.as_tensor(np.concatenate(parts, -1).T.copy()).float()
        elif part == "values" and not name.endswith(OFFSETS):
            shifted = f"{name}{OFFSETS}.values" in found  # see `Graph.matmul_nbits`
            bits = BITS.get(weight_precision(action, name, target.ternary))  # a skip has none
            weight, size = _dequantized(
                found, name, block_size, torch.float32 if shifted else dtype, bits
            )
            if shifted:
                offsets, _ = _dequantized(found, f"{name}{OFFSETS}", block_size, torch.float32)
                offsets = offsets[:, : weight.shape[1] // block_size]
                weight = weight[: len(offsets)] + offsets.repeat_interleave(block_size, 1)
        else:
            continue
        bias = _bias(found, name, dtype)
        projections[name] = StoredLinear(name, weight.to(dtype), bias, block_size=size)
    return projections


def _dequantized(
    found: dict[str, np.ndarray],
    name: str,
    block_size: int,
    dtype: torch.dtype,
    bits: Bits | None = None,
) -> tuple[torch.Tensor, int]:
    """A quantized weight `[N, K]`; experts stacked, `[E * N, K]`; and its block size."""
    scales = found[f"{name}.scales"].astype(np.float32)
    scales = scales.reshape(-1, scales.shape[-1])  # [N, blocks]
    values = found[f"{name}.values"].reshape(*scales.shape, -1)  # [N, blocks, bytes]
    bits = bits or (8 if values.shape[2] == block_size else 4)
    block_size = 8 * values.shape[2] // bits
    shape = values.shape[0], values.shape[1] * block_size
    zero_points = found.get(f"{name}.zero_points")
    if zero_points is not None:
        zero_points = zero_points.reshape(len(scales), -1)
    weight = Quantized(values, scales, zero_points, shape, bits, block_size)
    return dequantize(weight, dtype), block_size
