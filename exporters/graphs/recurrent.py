"""Layers that keep a state of fixed size in place of K/V: what they compute, and what they keep."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from dash_onnx.exporters.architectures.base import Conv, Layer
from dash_onnx.exporters.graphs.attention import ATTENTION
from dash_onnx.exporters.graphs.graph import Graph

States = dict[str, ir.Value]
"""By port, what a layer keeps for later tokens."""


def short_conv(graph: Graph, projected: ir.Value, layer: Layer) -> tuple[ir.Value, States]:
    """A short convolution between two factors.

    Args:
        graph: with the ports of a layer.
        projected: both factors of what it reads and the factor on its result, stacked,
            `[batch, seq, 3 * D]`.
        layer: its weights.

    Returns:
        Its result `[batch, seq, D]`, named `ATTENTION`, and the states.
    """
    assert layer.conv is not None
    before, x, behind = split(graph, projected, [layer.output.in_features] * 3, "in")
    result, state = _convolved(graph, graph.op.Mul(before, x), layer.conv)
    return graph.op.Mul(behind, result, _outputs=[graph.value(ATTENTION)]), {"present_conv": state}


def keep(graph: Graph, kept: Sequence[ir.Value], layer: Layer) -> States:
    """The states of a layer that computes nothing else.

    Args:
        graph: with the ports of a layer.
        kept: parts of the input projection that states depend on, see `kept_rows`.
        layer: its weights.
    """
    assert layer.conv is not None
    before, x = kept
    return {"present_conv": _last(graph, graph.op.Mul(before, x), layer.conv)}


def split(graph: Graph, x: ir.Value, sizes: Sequence[int], name: str) -> Sequence[ir.Value]:
    """X cut along its last axis."""
    outputs = [graph.value(f"{name}.{number}") for number in range(len(sizes))]
    parts: Sequence[ir.Value] = graph.op.Split(x, graph.int64(*sizes), axis=-1, _outputs=outputs)
    return parts


def _convolved(
    graph: Graph, x: ir.Value, conv: Conv, activation: str = "none"
) -> tuple[ir.Value, ir.Value]:
    """The convolution of `[batch, seq, channels]` behind its state, and the new state."""
    bias = None if conv.bias is None else graph.activation_tensor("conv.bias", conv.bias)
    outputs = [graph.value("conv.out"), graph.value("present_conv")]
    result, state = graph.ms.CausalConvWithState(
        x,
        graph.activation_tensor("conv", conv.weight[:, None]),
        bias,
        graph.inputs["past_conv"],
        channels_last=1,
        activation=activation,
        _outputs=outputs,
    )
    return result, state


def _last(graph: Graph, x: ir.Value, conv: Conv) -> ir.Value:
    """The state of the convolution behind `[batch, seq, channels]`: its last inputs."""
    op, count = graph.op, conv.weight.shape[1] - 1
    both = op.Concat(graph.inputs["past_conv"], x, axis=1)
    end = graph.int64(2**31)
    return op.Slice(both, graph.int64(-count), end, graph.int64(1))
