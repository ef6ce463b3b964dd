"""Products of many rows: INT8 weights with a scale per output feature, INT8 rows with one each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from dash_onnx.exporters.architectures.base import Linear
from dash_onnx.exporters.quantize.blockwise import quantize

if TYPE_CHECKING:
    from dash_onnx.exporters.graphs.graph import Graph

LARGE_CHANNELS = 16
"""One in this many inputs of the MLP's second product, the largest ones, is rounded separately. It
costs a twentieth of that product's time and removes a third of the wide form's loss."""

LEVELS = 127
"""Largest level of a weight: -128 has no positive counterpart."""

_TINY = 1e-30  # floor of a row's largest value: a row of zeros stays zero
_ZERO = 128  # unsigned level of zero
_PROBED = 4, 32, 16  # rows, inputs, outputs: large enough to use every kernel


def wide_product(graph: Graph, x: ir.Value, linear: Linear) -> tuple[ir.Value, ir.Value]:
    """X `[batch, seq, K]` -> `[batch, seq, N]`, without the bias, and a factor per row.

    Each row is divided by its largest value, so that outliers in one row do not coarsen the others,
    and no row depends on the other rows of its pass. Then all rows share one scale. The caller
    multiplies the product by the largest values, `[batch, seq, 1]`.

    Weights are signed, which suits the fastest kernels, or unsigned on processors whose kernel for
    signed weights adds two products in 16 bits and saturates. ONNX Runtime finds out when it loads
    the graph: the test, its branch and the unused weights are constants that it folds.
    """
    op, name = graph.op, linear.name
    levels, scales = quantize_columns(linear.weight)
    values = graph.tensor(f"{name}.values", levels)
    step = graph.tensor(f"{name}.step", np.array(1 / LEVELS, np.float32))
    zero = graph.tensor(f"{name}.zero", np.array(_ZERO, np.uint8))
    factors = graph.tensor(f"{name}.scales", scales)
    most = op.ReduceMax(op.Abs(x), graph.int64(-1), keepdims=1)
    most = op.Max(most, graph.tensor(f"{name}.tiny", np.array(_TINY, np.float32)))
    rows = op.QuantizeLinear(op.Div(x, most), step, zero)

    def signed() -> Sequence[ir.Value]:
        return [graph.ms.MatMulIntegerToFloat(rows, values, step, factors, zero)]

    def unsigned() -> Sequence[ir.Value]:
        # Two's complement with the top bit flipped: the level plus 128.
        turned = graph.op.BitwiseXor(graph.op.Cast(values, to=ir.DataType.UINT8), zero)
        zeros = graph.tensor(f"{name}.zeros", np.full(len(scales), _ZERO, np.uint8))
        return [graph.ms.MatMulIntegerToFloat(rows, turned, step, factors, zero, zeros)]

    return graph.either(_exact(graph, name), signed, unsigned, [f"{name}.product"]), most


def quantize_columns(
    weight: torch.Tensor,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Levels -127..127, `[K, N]`, and scales `[N]` of a weight `[N, K]`: one for each row.

    ORT's integer products require one scale for each output feature.
    """
    rows = quantize(weight, 8, weight.shape[1])
    return (rows.values[:, 0] ^ _ZERO).view(np.int8).T, rows.scales[:, 0]


def channel_groups(graph: Graph, linear: Linear) -> list[npt.NDArray[np.int64]]:
    """Groups of a product's inputs that are rounded separately: the largest few, and the others.

    Returns:
        Their indices; a single group without a calibration to show which ones are large.
    """
    hessian, count = graph.hessians.get(linear.name), linear.in_features
    few = count // LARGE_CHANNELS
    if hessian is None or not few:
        return [np.arange(count)]
    sizes = hessian.diagonal().numpy(force=True)
    order = np.argsort(-sizes, kind="stable").astype(np.int64)
    return [np.sort(order[:few]), np.sort(order[few:])]


def _exact(graph: Graph, name: str) -> ir.Value:
    """Whether this machine's product of unsigned rows with signed weights is exact."""
    op, (rows, inputs, outputs) = graph.op, _PROBED
    found = op.MatMulInteger(
        graph.tensor(f"{name}.largest_rows", np.full((rows, inputs), 255, np.uint8)),
        graph.tensor(f"{name}.largest_weights", np.full((inputs, outputs), LEVELS, np.int8)),
    )
    right = graph.tensor(f"{name}.right", np.array(255 * LEVELS * inputs, np.int32))
    return op.Equal(op.ReduceMin(found, keepdims=0), right)
