"""A skipped layer: its compensation, and the token's own K/V entry or state update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import numpy_helper

from dash_onnx.core.actions import SKIP, Form
from dash_onnx.core.contract import data_name, layer_path
from dash_onnx.core.facts import Target
from dash_onnx.exporters.architectures.base import Layer, Linear, ModelSpec, stack
from dash_onnx.exporters.graphs.attention import (
    Heads,
    KVQuantization,
    attend_grouped,
    rotated,
    write_kv,
)
from dash_onnx.exporters.graphs.graph import INLINE_BYTES, Graph
from dash_onnx.exporters.graphs.layer import heads_of
from dash_onnx.exporters.graphs.recurrent import States, keep
from dash_onnx.exporters.quantize.blockwise import dequantize, quantize

_EXPAND = "expand_proj"


def build_skip(
    folder: Path,
    index: int,
    layer: Layer,
    spec: ModelSpec,
    target: Target,
    scale: float,
    correction: tuple[torch.Tensor, torch.Tensor] | None,
    hessians: Mapping[str, torch.Tensor],
    kv: KVQuantization | None = None,
) -> None:
    """Writes `layers/NN/skip.onnx`.

    K and V are projected from the layer's input in INT4 (INT8 without Hessians), K is rotated,
    and both are scattered into the cache at the token's position, so that later tokens attend
    to a skipped token as to any other. A quantized cache is written by GroupQueryAttention; its
    attention output is not used, and is cheap for a single token. A layer without attention
    updates its states instead; one that reads K/V of another layer keeps nothing.

    Args:
        scale: the layer's calibrated mean of ||y|| / ||x||.
        correction: A `[r, D]` and B `[D, r]` of the map from the normed input to the difference
            between the layer's output and `scale * x`; None returns `scale * x`.
        hessians: see `Graph`; uses that of `layer.qkv`, whose input this graph shares.
        kv: how a quantized cache rounds.
    """
    mixer = spec.mixer_of(index)
    ports = spec.layer_ports(target, index)
    shared = {"skip_proj": hessians[layer.qkv.name]} if hessians else {}
    graph = Graph(f"layer_{index}_skip", ports, target, spec.block, shared)
    op, hidden = graph.op, graph.inputs["hidden_in"]  # [batch, seq, D]
    first, sizes = kept_rows(spec, index)
    count = len(sizes)
    products = [layer.qkv.rows(first, first + sum(sizes), "kept")] if sizes else []
    if correction is not None:  # same input as K and V: one product for all three
        products.append(Linear("reduce", correction[0]))
        sizes = [*sizes, correction[0].shape[0]]
    parts: Sequence[ir.Value] = []
    if products:
        normed = graph.norm(hidden, "input_norm", layer.input_norm)
        precision: Form = "int4" if hessians else "int8"
        projected = graph.linear(normed, stack("skip_proj", *products), precision)
        parts = graph.split(projected, sizes, "kept")
    if mixer == "shared_attention":
        states: States = {}
    elif mixer == "attention":
        states = _kv(graph, parts[0], parts[1], layer, heads_of(spec, index), kv)
    else:
        states = keep(graph, normed, parts[:count], layer, spec)
    compensated = op.Mul(hidden, graph.activation_tensor("scale", torch.tensor(scale)))
    if correction is not None:
        expand = Linear(_EXPAND, correction[1])
        compensated = op.Add(compensated, graph.linear(parts[-1], expand, "int8"))
    graph.save(folder, layer_path(index, SKIP), hidden_out=compensated, **states)


def kept_rows(spec: ModelSpec, index: int) -> tuple[int, list[int]]:
    """First row of `qkv` that a skipped layer computes, and the sizes of the parts from there."""
    if spec.mixer_of(index) == "shared_attention":
        return 0, []
    if spec.mixer_of(index) == "short_conv":
        return 0, [spec.facts.hidden_size] * 2
    if spec.mixer_of(index) == "gated_delta":
        assert spec.recurrence is not None
        return 0, [spec.recurrence.channels]
    heads, size = spec.heads_of(index)
    return spec.facts.num_heads * size, [heads * size] * 2


def _kv(
    graph: Graph,
    key: ir.Value,
    value: ir.Value,
    layer: Layer,
    heads: Heads,
    kv: KVQuantization | None,
) -> States:
    """Keys and values `[batch, seq, H_kv * d]`, written into the cache."""
    if graph.block.heads_normed == "after":
        key = rotated(graph, key, heads, heads.keys)
        heads = replace(heads, rotated=0)
    key = graph.norm_heads(key, "k_norm", layer.k_norm, heads.keys * heads.size)
    value = graph.norm_heads(value, "v_norm", layer.v_norm, heads.keys * heads.size)
    if kv is None:
        cached = write_kv(graph, key, value, heads)
    else:
        own = replace(heads, queries=heads.keys, softcap=None, window=1)
        made = "unused", "present_key", "present_value"
        _, *cached = attend_grouped(graph, [key, key, value], own, made, kv)
    return dict(zip(("present_key", "present_value"), cached, strict=True))


def replace_expand(folder: Path, index: int, weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """Replaces the map from the reduced input, `[D, r]`, in a skip graph.

    The bundle may not be read yet.

    Returns:
        The map as the graph now stores it, rounded to INT8, `[D, r]` float32.
    """
    path = folder / layer_path(index, SKIP)
    model = onnx.load(path)
    rounded = quantize(weight, 8, block_size)
    for tensor in model.graph.initializer:
        name, _, part = tensor.name.rpartition(".")
        if name == _EXPAND:
            before = numpy_helper.to_array(tensor)
            after = np.asarray(getattr(rounded, part)).astype(before.dtype)
            tensor.CopyFrom(numpy_helper.from_array(after.reshape(before.shape), tensor.name))
    data = folder / data_name(layer_path(index, SKIP))
    data.unlink(missing_ok=True)  # else saving appends to it
    onnx.save(
        model, path, save_as_external_data=True, location=data.name, size_threshold=INLINE_BYTES
    )
    return dequantize(rounded)
