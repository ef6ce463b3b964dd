"""A decoder layer in one precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from dash_onnx.core.actions import WIDE, Form
from dash_onnx.core.contract import layer_path
from dash_onnx.core.facts import Target
from dash_onnx.exporters.architectures.base import Layer, Linear, ModelSpec
from dash_onnx.exporters.graphs.attention import (
    ATTENTION,
    Heads,
    KVQuantization,
    attend,
    rotated,
)
from dash_onnx.exporters.graphs.graph import Graph, block_size_of, weight_precision
from dash_onnx.exporters.graphs.mixture import mix
from dash_onnx.exporters.graphs.recurrent import States, gated_delta, short_conv
from dash_onnx.exporters.graphs.wide import channel_groups, wide_product

HIDDEN = "hidden_in"
"""The port of a layer's input."""


def captured_inputs(
    layer: Layer, spec: ModelSpec, block_size: int, forms: Sequence[Form]
) -> dict[str, str]:
    """Maps linear layers whose rounding depends on their input to that value in the graph."""
    attends = HIDDEN if layer.input_norm is None else "input_norm.out"
    if layer.post_norm is not None:
        reads = "post_norm.out"
    else:
        reads = attends if spec.block.parallel else "post_norm.sum"
    inputs = [
        (layer.qkv, attends),
        (layer.output, ATTENTION if layer.output_sub_norm is None else "output_sub_norm.out"),
        (layer.gate_up, reads),
        (layer.down, "activated" if layer.down_sub_norm is None else "down_sub_norm.out"),
        (None if layer.mixture is None else layer.mixture.up, reads),
        (layer.per_layer_gate, "mlp.sum"),
        (layer.per_layer_output, "per_layer.opened"),
    ]
    return {
        linear.name: value
        for linear, value in inputs
        if linear is not None
        # A skipped layer always rounds its K and V together with its compensation.
        and (
            linear is layer.qkv
            or (linear is layer.down and WIDE in forms)
            or _rounded(linear, block_size, forms)
        )
    }


def _rounded(linear: Linear, block_size: int, forms: Sequence[Form]) -> bool:
    """Whether INT4 or INT2 cannot hold a weight as it is."""
    if "int2" in {weight_precision(form, linear.name, ternary=False) for form in forms}:
        if linear.stored(2, block_size_of(2, block_size, linear.in_features)) is None:
            return True
    return linear.stored(4, block_size) is None


def build_layer(
    folder: Path,
    index: int,
    layer: Layer,
    spec: ModelSpec,
    target: Target,
    form: Form,
    hessians: Mapping[str, torch.Tensor],
    kv: KVQuantization | None = None,
) -> list[str]:
    """Writes `layers/NN/FORM.onnx`; returns `Graph.fp32_kept`, with the layer."""
    block, mixer = spec.block, spec.mixer_of(index)
    ports = spec.layer_ports(target, index)
    graph = Graph(f"layer_{index}_{form}", ports, target, block, hessians)
    op = graph.op

    hidden = graph.inputs[HIDDEN]  # [batch, seq, D]
    normed = graph.norm(hidden, "input_norm", layer.input_norm)
    projected = graph.linear(normed, layer.qkv, form)
    if spec.attends(index):
        mixed, states = _attention(graph, projected, layer, heads_of(spec, index), kv)
    elif mixer == "short_conv":
        mixed, states = short_conv(graph, projected, layer)
    else:
        mixed, states = gated_delta(graph, normed, projected, layer, spec)
    mixed = graph.norm(mixed, "output_sub_norm", layer.output_sub_norm)
    output = graph.linear(mixed, layer.output, form)
    output = graph.norm(output, "output_norm", layer.output_norm)
    if block.parallel:
        residual = op.Add(hidden, output)
        if layer.post_norm is not None:
            normed = graph.norm(hidden, "post_norm", layer.post_norm)
    else:
        normed, residual = graph.add_norm(output, hidden, "post_norm", layer.post_norm)
    down = _feed_forward(graph, normed, layer, form)
    down = graph.norm(down, "down_norm", layer.down_norm)
    result = op.Add(residual, down, _outputs=[graph.value("mlp.sum")])
    if layer.per_layer_gate is not None:
        result = _per_layer(graph, result, layer, index, form)
    if layer.factor is not None:
        result = op.Mul(result, graph.activation_tensor("layer_scalar", layer.factor))
    kept = graph.save(folder, layer_path(index, form), hidden_out=result, **states)
    return [f"layers.{index}.{name}" for name in kept]


def heads_of(spec: ModelSpec, index: int) -> Heads:
    """How the heads of a layer attend."""
    block, sees, (keys, size) = spec.block, spec.attention[index], spec.heads_of(index)
    return Heads(
        queries=spec.facts.num_heads,
        keys=keys,
        size=size,
        rotated=0 if sees.rope is None else 2 * len(spec.ropes[sees.rope].inv_freq),
        softcap=block.attention_softcap,
        window=sees.window,
        shared=sees.source is not None,
    )


def _attention(
    graph: Graph, qkv: ir.Value, layer: Layer, heads: Heads, kv: KVQuantization | None
) -> tuple[ir.Value, States]:
    """The heads' outputs `[batch, seq, H * d]`, and K and V of all tokens."""
    if layer.sinks is not None:
        heads = replace(heads, sinks=graph.activation_tensor("sinks", layer.sinks))
    gated, gate = graph.block.heads_gated, None
    if gated:
        width = layer.output.in_features
        qkv, gate = graph.split(qkv, [layer.qkv.out_features - width, width], "gated")
    projected = _projected(graph, qkv, layer, heads)
    if graph.block.heads_normed == "after":
        heads = replace(heads, rotated=0)
    name = "heads" if gated else ATTENTION
    attention, *written = attend(graph, projected, heads, kv, name)
    if gated:
        gate = graph.op.Sigmoid(gate)
        attention = graph.op.Mul(attention, gate, _outputs=[graph.value(ATTENTION)])
    return attention, dict(zip(("present_key", "present_value"), written, strict=False))


def _projected(
    graph: Graph, qkv: ir.Value, layer: Layer, heads: Heads
) -> tuple[ir.Value | None, ...]:
    """Normed queries, keys and values; stacked, then None twice, if nothing is done to them.

    If norms come after the rotation, queries and keys are rotated too.
    """
    if layer.q_norm is None and layer.k_norm is None and graph.block.query_scale is None:
        return qkv, None, None
    queries, keys = heads.queries * heads.size, heads.keys * heads.size
    if heads.shared:
        return (graph.norm_heads(qkv, "q_norm", layer.q_norm, queries),)
    q, k, v = graph.split(qkv, [queries, keys, keys], "projected")
    if graph.block.heads_normed == "after":
        q, k = rotated(graph, q, heads, heads.queries), rotated(graph, k, heads, heads.keys)
    q = graph.norm_heads(q, "q_norm", layer.q_norm, queries)
    k = graph.norm_heads(k, "k_norm", layer.k_norm, keys)
    v = graph.norm_heads(v, "v_norm", layer.v_norm, keys)
    return q, k, v


def _per_layer(graph: Graph, x: ir.Value, layer: Layer, index: int, form: Form) -> ir.Value:
    """X `[batch, seq, D]` plus its gated share of the layer's own token embedding."""
    op, gate, output = graph.op, layer.per_layer_gate, layer.per_layer_output
    assert gate is not None and output is not None
    number = op.Constant(value_int=index)
    own = op.Gather(graph.inputs["per_layer"], number, axis=2)  # [batch, seq, P]
    opened = _activation_of(graph, layer)(graph.linear(x, gate, form))
    opened = op.Mul(opened, own, _outputs=[graph.value("per_layer.opened")])
    added = graph.norm(graph.linear(opened, output, form), "per_layer_norm", layer.per_layer_norm)
    return op.Add(x, added)


def _feed_forward(graph: Graph, x: ir.Value, layer: Layer, form: Form) -> ir.Value:
    """Experts, MLP, or the sum of both: `[..., D]` -> `[..., D]`."""
    if layer.mixture is None:
        return _mlp(graph, x, layer, form)
    experts = mix(graph, x, layer.mixture, form)
    if layer.gate_up is None:
        return experts
    shared = _mlp(graph, x, layer, form)
    if (gate := layer.mixture.shared_gate) is not None:
        shared = graph.op.Mul(graph.op.Sigmoid(graph.linear(x, gate, "full")), shared)
    return graph.op.Add(experts, shared)


def _mlp(graph: Graph, x: ir.Value, layer: Layer, form: Form) -> ir.Value:
    """The MLP: `[..., D]` -> `[..., D]`."""
    if form == WIDE and layer.down_sub_norm is None:  # a norm needs all channels at once
        return _wide_mlp(graph, x, layer)
    assert layer.gate_up is not None and layer.down is not None
    op, gated = graph.op, graph.block.gated
    up = graph.linear(x, layer.gate_up, form)
    name, activation = graph.value("activated"), _activation_of(graph, layer)
    if gated:
        gate, up = graph.split(up, [layer.down.in_features] * 2, "gate_up")
        activated = op.Mul(activation(gate), up, _outputs=[name])
    else:
        activated = activation(up, _outputs=[name])
    activated = graph.norm(activated, "down_sub_norm", layer.down_sub_norm)
    return graph.linear(activated, layer.down, form)


def _wide_mlp(graph: Graph, x: ir.Value, layer: Layer) -> ir.Value:
    """The same in the wide form, with the inputs of `down` in groups."""
    op, gate_up, down = graph.op, layer.gate_up, layer.down
    assert gate_up is not None and down is not None
    groups = channel_groups(graph, down)
    sizes, order = [len(group) for group in groups], np.concatenate(groups)
    if graph.block.gated:
        order = np.concatenate([order, order + down.in_features])
    gate_up = gate_up.reordered(order)
    factor: ir.Value | None = None
    if graph.block.gated and gate_up.bias is None:
        # Inputs of `down` are divided by their largest value: the factor of `up` can wait.
        up, factor = wide_product(graph, x, gate_up)
    else:
        up = graph.linear(x, gate_up, WIDE)
    parts = graph.split(up, sizes * (2 if graph.block.gated else 1), "gate_up")
    activation = _activation_of(graph, layer)
    total: ir.Value | None = None
    for number, group in enumerate(groups):
        activated = parts[number] if factor is None else op.Mul(parts[number], factor)
        activated = activation(activated)
        if graph.block.gated:
            activated = op.Mul(activated, parts[len(groups) + number])
        part = down.columns(group, f"{down.name}.{number}")
        product, largest = wide_product(graph, activated, part)
        product = op.Mul(product, largest if factor is None else op.Mul(largest, factor))
        total = product if total is None else op.Add(total, product)
    assert total is not None
    if down.bias is not None:
        total = op.Add(total, graph.activation_tensor("down_proj.bias", down.bias))
    return total


def _activation_of(graph: Graph, layer: Layer) -> Callable[..., ir.Value]:
    """The activation: a function of a value of the graph and of its output's name."""
    op, kind = graph.op, graph.block.activation

    def relu2(x: ir.Value, **outputs: list[ir.Value]) -> ir.Value:
        positive = op.Relu(x)
        return op.Mul(positive, positive, **outputs)

    if kind == "silu":  # QuickGelu(alpha=1) is SiLU in one kernel
        return partial(graph.ms.QuickGelu, alpha=1.0)
    if kind == "relu":
        return op.Relu
    if kind == "relu2":
        return relu2
    if kind == "xielu":
        assert layer.xielu is not None
        factors = graph.activation_tensor("xielu", layer.xielu)
        linear, square, elu = graph.split(factors, [1, 1, 1], "xielu.part")

        def xielu(x: ir.Value, **outputs: list[ir.Value]) -> ir.Value:
            total = op.Add(op.Mul(x, linear), op.Mul(op.Elu(x), elu))
            return op.Add(op.Mul(relu2(x), square), total, **outputs)

        return xielu
    return partial(op.Gelu, approximate="tanh" if kind == "gelu_tanh" else "none")
