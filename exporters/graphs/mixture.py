"""A mixture of experts: the products of ONNX Runtime's MoE and QMoE."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from dash_onnx.core.actions import Form
from dash_onnx.core.block import Experts
from dash_onnx.exporters.architectures.base import Linear, Mixture
from dash_onnx.exporters.graphs.graph import BITS, Graph
from dash_onnx.exporters.quantize.blockwise import Quantized, quantize
from dash_onnx.exporters.quantize.gptq import gptq


def mix(graph: Graph, x: ir.Value, mixture: Mixture, form: Form) -> ir.Value:
    """What the experts of each token add, weighted: `[batch, seq, D]` -> `[batch, seq, D]`.

    The router is in full precision in all forms: another expert is a larger error than any rounding
    of the same one.
    """
    experts = graph.block.experts
    assert experts is not None
    scores = graph.op.Reshape(
        graph.linear(x, mixture.router, "full"), graph.int64(-1, experts.count)
    )
    how: dict[str, Any] = {
        "k": experts.per_token,
        "activation_type": "swiglu",
        "activation_alpha": 1.0,  # gate * sigmoid(alpha * gate) * (up + beta)
        "activation_beta": 0.0,
        "swiglu_fusion": 1,  # gates and ups in turn
        "normalize_routing_weights": int(experts.normalized),
    }
    if form == "full":
        up, down = (_exact(graph, part, experts) for part in (mixture.up, mixture.down))
        return graph.ms.MoE(x, scores, up, None, down, **how)
    # QMoE normalizes weights that it computes itself, whatever it is told.
    weights = None if experts.normalized else graph.op.Softmax(scores, axis=-1)
    up, down = (_rounded(graph, part, form) for part in (mixture.up, mixture.down))
    stored = [_stored(graph, *part, experts) for part in ((mixture.up, up), (mixture.down, down))]
    (up_values, up_scales, up_zeros), (down_values, down_scales, down_zeros) = stored
    return graph.ms.QMoE(
        *(x, scores, up_values, up_scales, None, down_values, down_scales, None, None, None, None),
        *(up_zeros, down_zeros, None, weights),
        expert_weight_bits=up.bits,
        block_size=up.block_size,
        accuracy_level=graph.target.accuracy_level,
        weights_prepacked=0,
        **how,
    )


def _rounded(graph: Graph, linear: Linear, form: Form) -> Quantized:
    """All experts see the Hessian of all tokens, so that rare ones are rounded like the others."""
    bits, block = BITS[form], graph.target.block_size
    if bits == 8 or not graph.hessians:
        return quantize(linear.weight, bits, block)
    hessian = graph.hessians.get(linear.name)
    if hessian is None:  # no input: to the nearest level, of the scale that errs least
        hessian = torch.eye(linear.in_features)
    return gptq(linear.weight, hessian, block, bits)


def _stored(
    graph: Graph, linear: Linear, weight: Quantized, experts: Experts
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Integers, scales and zero points, `[E, N, ...]`."""

    def tensor(part: str, array: np.ndarray) -> ir.Value:
        shape = experts.count, len(array) // experts.count, -1
        return graph.tensor(f"{linear.name}.{part}", array.reshape(shape))

    zeros = weight.zero_points
    return (
        tensor("values", weight.values),
        tensor("scales", weight.scales),
        None if zeros is None else tensor("zero_points", zeros),
    )


def _exact(graph: Graph, linear: Linear, experts: Experts) -> ir.Value:
    """`[E, N, K]` in float32; stored as FP16 unless ONNX Runtime would cast it at every run."""
    name, weight = f"{linear.name}.weight", linear.weight
    small = weight.numel() <= graph.folded
    array = graph.stored_half(name, weight) if small else weight.float().numpy()
    stored = graph.tensor(name, array.reshape(experts.count, -1, linear.in_features))
    if array.dtype == np.float32:
        return stored
    return graph.op.Cast(stored, to=ir.DataType.FLOAT)
