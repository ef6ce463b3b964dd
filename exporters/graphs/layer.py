"""A decoder layer in one precision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from dash_onnx.actions import Action
from dash_onnx.contract import layer_path, layer_ports
from dash_onnx.exporters.architectures.base import Layer, ModelSpec
from dash_onnx.exporters.graphs.build import Graph
from dash_onnx.exporters.graphs.dims import dims_of
from dash_onnx.manifest import Target

TAPS = {
    "qkv_proj": "input_norm.out",
    "o_proj": "attention",
    "gate_up_proj": "post_norm.out",
    "down_proj": "activated",
}
"""By linear layer, the value inside the graph that is its input."""


def build_layer(
    folder: Path,
    index: int,
    layer: Layer,
    spec: ModelSpec,
    target: Target,
    precision: Action,
    hessians: Mapping[str, torch.Tensor],
) -> tuple[str, ...]:
    """Writes `layers/NN/{full,int8,int4}.onnx`.

    Args:
        hessians: see `Graph`; `TAPS` names the values they are measured on.

    Returns:
        Names of weights that FP16 cannot hold and that were stored as FP32.
    """
    facts = spec.facts
    ports = layer_ports(dims_of(spec, target))
    graph = Graph(f"layer_{index}_{precision}", ports, target, spec.norm_epsilon, hessians)
    op, ms, inputs = graph.op, graph.ms, graph.inputs

    hidden = inputs["hidden_in"]  # [1, seq, D]
    normed = graph.rms_norm(hidden, "input_norm", layer.input_norm)
    qkv = graph.linear(normed, layer.qkv, precision)  # [1, seq, (H + 2 * H_kv) * d]
    attention, key, value = ms.GroupQueryAttention(
        qkv,
        None,
        None,
        inputs["past_key"],
        inputs["past_value"],
        inputs["seqlens_k"],
        inputs["total_sequence_length"],
        inputs["cos_cache"],
        inputs["sin_cache"],
        num_heads=facts.num_heads,
        kv_num_heads=facts.num_kv_heads,
        do_rotary=1,
        _outputs=[
            graph.value(TAPS[layer.output.name]),
            graph.value("present_key"),
            graph.value("present_value"),
        ],
    )
    output = graph.linear(attention, layer.output, precision)
    normed, residual = graph.add_rms_norm(output, hidden, "post_norm", layer.post_norm)
    gate_up = graph.linear(normed, layer.gate_up, precision)  # [1, seq, 2 * I]
    gate, up = op.Split(
        gate_up, axis=-1, num_outputs=2, _outputs=[graph.value("gate"), graph.value("up")]
    )
    # QuickGelu(alpha=1) is SiLU in one kernel.
    activated = op.Mul(
        ms.QuickGelu(gate, alpha=1.0), up, _outputs=[graph.value(TAPS[layer.down.name])]
    )
    down = graph.linear(activated, layer.down, precision)
    graph.save(
        folder,
        layer_path(index, precision),
        hidden_out=op.Add(residual, down),
        present_key=key,
        present_value=value,
    )
    return tuple(f"layers.{index}.{name}" for name in graph.fp32_kept)
