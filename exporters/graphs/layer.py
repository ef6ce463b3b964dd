"""A decoder layer in one precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch

from dash_onnx.core.actions import Action
from dash_onnx.core.contract import layer_path, layer_ports
from dash_onnx.core.facts import Target
from dash_onnx.exporters.architectures.base import Layer, ModelSpec
from dash_onnx.exporters.graphs.graph import Graph, KVScales, weight_precision

HIDDEN = "hidden_in"
"""The port of a layer's input."""


def captured_inputs(
    layer: Layer, spec: ModelSpec, block_size: int, variants: Sequence[Action]
) -> dict[str, str]:
    """By linear layer that GPTQ rounds, the value inside the graph that is its input."""
    attends = HIDDEN if layer.input_norm is None else "input_norm.out"
    if layer.post_norm is not None:
        reads = "post_norm.out"
    else:
        reads = attends if spec.block.parallel else "post_norm.sum"
    inputs = [
        (layer.qkv, attends),
        (layer.output, "attention"),
        (layer.gate_up, reads),
        (layer.down, "activated"),
    ]
    return {
        linear.name: value
        for linear, value in inputs
        # A skipped layer rounds its K and V together with its compensation, always.
        if linear is layer.qkv
        or "int2" in {weight_precision(variant, linear.name) for variant in variants}
        or linear.stored(4, block_size) is None
    }


def build_layer(
    folder: Path,
    index: int,
    layer: Layer,
    spec: ModelSpec,
    target: Target,
    precision: Action,
    hessians: Mapping[str, torch.Tensor],
    kv_scales: KVScales | None = None,
) -> list[str]:
    """Writes `layers/NN/{full,int8,int4,int2}.onnx`; returns `Graph.fp32_kept`, with the layer."""
    ports, block = layer_ports(spec.dims(target)), spec.block
    graph = Graph(f"layer_{index}_{precision}", ports, target, block, hessians)
    op = graph.op

    hidden = graph.inputs[HIDDEN]  # [batch, seq, D]
    normed = graph.norm(hidden, "input_norm", layer.input_norm)
    qkv = graph.linear(normed, layer.qkv, precision)  # [batch, seq, (H + 2 * H_kv) * d]
    attention, key, value = _attend(graph, qkv, index, layer, spec, kv_scales)
    output = graph.linear(attention, layer.output, precision)
    output = graph.norm(output, "output_norm", layer.output_norm)
    if block.parallel:
        residual = op.Add(hidden, output)
        if layer.post_norm is not None:
            normed = graph.norm(hidden, "post_norm", layer.post_norm)
    else:
        normed, residual = graph.add_norm(output, hidden, "post_norm", layer.post_norm)
    activated = _activate(graph, graph.linear(normed, layer.gate_up, precision))
    down = graph.linear(activated, layer.down, precision)
    down = graph.norm(down, "down_norm", layer.down_norm)
    outputs = {"hidden_out": op.Add(residual, down), "present_key": key, "present_value": value}
    kept = graph.save(folder, layer_path(index, precision), **outputs)
    return [f"layers.{index}.{name}" for name in kept]


def _attend(
    graph: Graph,
    qkv: ir.Value,
    index: int,
    layer: Layer,
    spec: ModelSpec,
    kv_scales: KVScales | None,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Returns the heads' outputs `[batch, seq, H * d]`, and K and V of all tokens."""
    facts, block, sees = spec.facts, spec.block, spec.attention[index]
    projected: list[ir.Value | None] = [qkv, None, None]
    if layer.q_norm is not None or layer.k_norm is not None:
        queries, keys = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
        q, k, v = graph.op.Split(
            qkv,
            graph.int64(queries, keys, keys),
            axis=-1,
            _outputs=[graph.value(name) for name in ("query", "key", "value")],
        )
        q = graph.norm_heads(q, "q_norm", layer.q_norm, queries)
        k = graph.norm_heads(k, "k_norm", layer.k_norm, keys)
        projected = [q, k, v]
    options: dict[str, float] = {}  # those that differ from the operator's defaults
    if block.attention_scale != facts.head_dim**-0.5:
        options["scale"] = block.attention_scale
    if block.attention_softcap is not None:
        options["softcap"] = block.attention_softcap
    if sees.window is not None:
        options["local_window_size"] = sees.window
    rotates = sees.rope is not None
    return graph.attend(projected, facts.num_heads, rotates, kv_scales, "attention", **options)


def _activate(graph: Graph, up: ir.Value) -> ir.Value:
    """`[..., 2 * I]` (`[..., I]` without gate) -> `[..., I]`, the input of `down`."""
    op, name = graph.op, graph.value("activated")
    if not graph.block.gated:
        return _activation(graph, up, _outputs=[name])
    gate, up = op.Split(
        up, axis=-1, num_outputs=2, _outputs=[graph.value("gate"), graph.value("up")]
    )
    return op.Mul(_activation(graph, gate), up, _outputs=[name])


def _activation(graph: Graph, x: ir.Value, **outputs: list[ir.Value]) -> ir.Value:
    kind = graph.block.activation
    if kind == "silu":  # QuickGelu(alpha=1) is SiLU in one kernel
        return graph.ms.QuickGelu(x, alpha=1.0, **outputs)
    return graph.op.Gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none", **outputs)
