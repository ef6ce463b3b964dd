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
from dash_onnx.exporters.quantize.blockwise import Bits, Quantized, quantize
from dash_onnx.exporters.quantize.gptq import gptq

_NEVER = -1e30  # score of an expert that is not chosen


def mix(graph: Graph, x: ir.Value, mixture: Mixture, form: Form) -> ir.Value:
    """The weighted sum of each token's experts: `[batch, seq, D]` -> `[batch, seq, D]`.

    The router is in full precision in all forms: choosing another expert is a larger error than any
    rounding of the same one.
    """
    experts = graph.block.experts
    assert experts is not None
    scores = graph.op.Reshape(
        graph.linear(x, mixture.router, "full"), graph.int64(-1, experts.count)
    )
    how: dict[str, Any] = {
        "k": experts.per_token,
        "activation_type": "swiglu",
        "activation_alpha": experts.gate_slope,
        "activation_beta": experts.up_offset,
        "swiglu_fusion": 1,  # gate and up rows alternate
        "normalize_routing_weights": int(experts.normalized),
    }
    if experts.limit is not None:
        how["swiglu_limit"] = experts.limit
    parts = mixture.up, mixture.down
    up_bias, down_bias = (_bias(graph, part, experts) for part in parts)
    if form == "full":
        if experts.scoring == "sigmoid" or mixture.choice_bias is not None:
            scores = _logarithms(graph, scores, mixture, experts)
        up, down = (_exact(graph, part, experts) for part in parts)
        added = graph.ms.MoE(x, scores, up, up_bias, down, down_bias, **how)
    else:
        scores, weights = _choice(graph, scores, mixture, experts)
        bits, block = BITS[form], graph.target.block_size
        (up, up_scales, up_zeros), (down, down_scales, down_zeros) = (
            _stored(graph, part, _rounded(graph, part, bits), experts) for part in parts
        )
        added = graph.ms.QMoE(
            *(x, scores, up, up_scales, up_bias, down, down_scales, down_bias),
            *(None, None, None, up_zeros, down_zeros, None, weights),
            expert_weight_bits=bits,
            block_size=block,
            accuracy_level=graph.target.accuracy_level,
            weights_prepacked=0,
            **how,
        )
    if experts.factor != 1.0:
        added = graph.op.Mul(added, graph.activation_tensor("factor", torch.tensor(experts.factor)))
    return added


def _choice(
    graph: Graph, scores: ir.Value, mixture: Mixture, experts: Experts
) -> tuple[ir.Value, ir.Value | None]:
    """What QMoE selects by, and what it weights by if that differs, `[tokens, E]`."""
    softmax, bias = experts.scoring == "softmax", mixture.choice_bias
    if softmax and experts.normalized and bias is None:
        return scores, None  # QMoE always normalizes weights that it computes itself
    weights = graph.op.Softmax(scores, axis=-1) if softmax else graph.op.Sigmoid(scores)
    if bias is None:
        return scores if softmax else weights, weights
    return graph.op.Add(weights, graph.activation_tensor("choice_bias", bias)), weights


def _logarithms(graph: Graph, scores: ir.Value, mixture: Mixture, experts: Experts) -> ir.Value:
    """Scores whose softmax is the normalized weights of the chosen experts, `[tokens, E]`.

    MoE accepts the weights in no other way.
    """
    op, (by, weights) = graph.op, _choice(graph, scores, mixture, experts)
    _, chosen = op.TopK(by, graph.int64(experts.per_token), _outputs=2)
    logarithms = op.Log(op.GatherElements(weights, chosen, axis=-1))
    never = op.Expand(graph.tensor("never", np.array(_NEVER, np.float32)), op.Shape(scores))
    return op.ScatterElements(never, chosen, logarithms, axis=-1)


def _rounded(graph: Graph, linear: Linear, bits: Bits) -> Quantized:
    """All experts share the Hessian of all tokens, so rare ones are rounded as well as others."""
    block = graph.target.block_size
    if bits == 8 or not graph.hessians:
        return quantize(linear.weight, bits, block)
    hessian = graph.hessians.get(linear.name)
    if hessian is None:  # no input: nearest level, at the best scale
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


def _bias(graph: Graph, linear: Linear, experts: Experts) -> ir.Value | None:
    """`[E, N]`."""
    if linear.bias is None:
        return None
    return graph.activation_tensor(f"{linear.name}.bias", linear.bias.view(experts.count, -1))


def _exact(graph: Graph, linear: Linear, experts: Experts) -> ir.Value:
    """`[E, N, K]` in float32; stored as FP16 unless ORT would repeat the cast at every run."""
    name, weight = f"{linear.name}.weight", linear.weight
    small = weight.numel() <= graph.folded
    array = graph.stored_half(name, weight) if small else weight.float().numpy()
    stored = graph.tensor(name, array.reshape(experts.count, -1, linear.in_features))
    if array.dtype == np.float32:
        return stored
    return graph.op.Cast(stored, to=ir.DataType.FLOAT)
