"""Layers that keep a state of fixed size instead of K/V: what they compute and keep."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from dash_onnx.core.block import Recurrence
from dash_onnx.exporters.architectures.base import Conv, Layer, ModelSpec
from dash_onnx.exporters.graphs.attention import ATTENTION
from dash_onnx.exporters.graphs.graph import Graph

_MIN_LENGTH = 1e-6  # added to squared norms, as in transformers

States = dict[str, ir.Value]
"""By port, what a layer keeps for later tokens."""


def short_conv(graph: Graph, projected: ir.Value, layer: Layer) -> tuple[ir.Value, States]:
    """A short convolution between two factors.

    Args:
        graph: graph with the ports of a layer.
        projected: both factors of its input and the factor on its result, stacked,
            `[batch, seq, 3 * D]`.
        layer: its weights.

    Returns:
        Its result `[batch, seq, D]`, named `ATTENTION`, and the states.
    """
    assert layer.conv is not None
    before, x, behind = graph.split(projected, [layer.output.in_features] * 3, "in")
    result, state = _convolved(graph, graph.op.Mul(before, x), layer.conv)
    return graph.op.Mul(behind, result, _outputs=[graph.value(ATTENTION)]), {"present_conv": state}


def gated_delta(
    graph: Graph, normed: ir.Value, projected: ir.Value, layer: Layer, spec: ModelSpec
) -> tuple[ir.Value, States]:
    """A Gated DeltaNet (Yang et al., arXiv 2412.06464).

    Args:
        graph: graph with the ports of a layer.
        normed: input of its projections, `[batch, seq, D]`.
        projected: input of its convolution and the gate of its result, stacked.
        layer: its weights.
        spec: description of the model.

    Returns:
        Its result `[batch, seq, value_heads * value_dim]`, named `ATTENTION`, and the states.
    """
    op, sizes = graph.op, _sizes(spec)
    assert layer.delta is not None
    x, gate = graph.split(projected, [sizes.channels, sizes.value_width], "in")
    result, states = _delta(graph, normed, x, layer, sizes)
    heads = op.Reshape(result, graph.int64(0, 0, -1, sizes.value_dim))
    heads = graph.norm(heads, "delta_norm", layer.delta.norm)
    result = op.Reshape(heads, graph.int64(0, 0, sizes.value_width))
    opened = graph.ms.QuickGelu(gate, alpha=1.0)  # SiLU
    return op.Mul(result, opened, _outputs=[graph.value(ATTENTION)]), states


def keep(
    graph: Graph, normed: ir.Value, kept: Sequence[ir.Value], layer: Layer, spec: ModelSpec
) -> States:
    """The states that a skipped layer keeps; nothing else is computed.

    Args:
        graph: graph with the ports of a layer.
        normed: input of its projections, `[batch, seq, D]`.
        kept: parts of the input projection that the states depend on, see `kept_rows`.
        layer: its weights.
        spec: description of the model.
    """
    assert layer.conv is not None
    if layer.delta is not None:
        return _delta(graph, normed, kept[0], layer, _sizes(spec))[1]
    before, x = kept
    return {"present_conv": _last(graph, graph.op.Mul(before, x), layer.conv)}


def _convolved(
    graph: Graph, x: ir.Value, conv: Conv, activation: str = "none"
) -> tuple[ir.Value, ir.Value]:
    """The convolution over its state and `[batch, seq, channels]`, and the new state."""
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
    """The convolution's state after `[batch, seq, channels]`: its last inputs."""
    op, count = graph.op, conv.weight.shape[1] - 1
    both = op.Concat(graph.inputs["past_conv"], x, axis=1)
    end = graph.int64(2**31)
    return op.Slice(both, graph.int64(-count), end, graph.int64(1))


def _delta(
    graph: Graph, normed: ir.Value, x: ir.Value, layer: Layer, sizes: Recurrence
) -> tuple[ir.Value, States]:
    """Head outputs `[batch, seq, value_heads * value_dim]` from the convolution's inputs."""
    op, conv, delta = graph.op, layer.conv, layer.delta
    assert conv is not None and delta is not None
    x, conv_state = _convolved(graph, x, conv, "silu")
    widths = [2 * sizes.key_width, sizes.value_width]
    both, value = graph.split(x, widths, "convolved")
    both = op.Reshape(both, graph.int64(0, 0, -1, sizes.key_dim))
    # Queries and keys are normalized to length 1: an RMSNorm up to a factor.
    factor = np.full(sizes.key_dim, sizes.key_dim**-0.5, np.float32)
    both = op.RMSNormalization(
        both, graph.tensor("unit", factor), axis=-1, epsilon=_MIN_LENGTH / sizes.key_dim
    )
    both = op.Reshape(both, graph.int64(0, 0, 2 * sizes.key_width))
    query, key = graph.split(both, [sizes.key_width] * 2, "unit")
    a, b = graph.split(graph.linear(normed, delta.gates, "full"), [sizes.value_heads] * 2, "gates")
    decay, rate = graph.ms.LinearAttentionGate(
        a,
        graph.tensor("decay_bias", delta.decay_bias.float().numpy()),
        graph.tensor("decay", delta.decay.float().numpy()),
        b,
        _outputs=[graph.value(name) for name in ("decay.out", "rate.out")],
    )
    result, state = graph.ms.LinearAttention(
        query,
        key,
        value,
        graph.inputs["past_recurrent"],
        decay,
        rate,
        q_num_heads=sizes.key_heads,
        kv_num_heads=sizes.value_heads,
        update_rule="gated_delta",
        _outputs=[graph.value(name) for name in ("delta.out", "present_recurrent")],
    )
    return result, {"present_conv": conv_state, "present_recurrent": state}


def _sizes(spec: ModelSpec) -> Recurrence:
    assert spec.recurrence is not None
    return spec.recurrence
