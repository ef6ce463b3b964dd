"""Both ends of the model: the token embedding, and the final norm with the LM head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dash_onnx.core.actions import Action
from dash_onnx.core.contract import EMBED_PATH, embed_ports, head_path, head_ports
from dash_onnx.core.facts import Target
from dash_onnx.exporters.architectures.base import Head, ModelSpec
from dash_onnx.exporters.graphs.graph import Graph
from dash_onnx.exporters.quantize.blockwise import (
    Quantized,
    concatenate,
    dequantize,
    quantize,
    row_groups,
)


def build_embed(folder: Path, table: torch.Tensor, spec: ModelSpec, target: Target) -> list[str]:
    """Writes `embed.onnx` from `[V, D]`; returns `Graph.fp32_kept`.

    It holds FP16 rows, or INT8 rows where those give exactly the same values.
    """
    graph = Graph("embed", embed_ports(spec.dims(target)), target, spec.block)
    ids = graph.inputs["input_ids"]
    exact = _exact_rows(table, target.block_size)
    if exact is not None:
        rows = graph.ms.GatherBlockQuantized(
            graph.tensor("embedding.values", exact.values.reshape(exact.shape)),
            ids,
            graph.tensor("embedding.scales", exact.scales.astype(np.float16)),
            block_size=target.block_size,
            bits=8,
            gather_axis=0,
            quantize_axis=1,
        )
    else:
        array = graph.stored_half("embedding", table)
        rows = graph.op.Gather(graph.tensor("embedding", array), ids)
    hidden = graph.op.Cast(rows, to=graph.dtype)
    if spec.scales.embedding != 1.0:
        scale = graph.activation_tensor("embedding_scale", torch.tensor(spec.scales.embedding))
        hidden = graph.op.Mul(hidden, scale)
    return graph.save(folder, EMBED_PATH, hidden=hidden)


def _exact_rows(table: torch.Tensor, block_size: int) -> Quantized | None:
    """INT8 rows with FP16 scales if they reproduce the FP16 rows to the last bit."""
    if table.shape[1] % block_size:
        return None
    parts = []
    for part in row_groups(table):
        rows = quantize(part, 8, block_size)
        scales = rows.scales.astype(np.float16)
        rows = replace(rows, scales=scales.astype(np.float32))
        if not torch.equal(dequantize(rows).half(), part.half()):
            return None
        parts.append(rows)
    return concatenate(parts, len(table))


def build_head(
    folder: Path,
    head: Head,
    spec: ModelSpec,
    target: Target,
    precision: Action,
    hessians: Mapping[str, torch.Tensor],
) -> list[str]:
    """Writes `head/{full,int8,int4}.onnx`; returns `Graph.fp32_kept`."""
    ports = head_ports(spec.dims(target))
    graph = Graph(f"head_{precision}", ports, target, spec.block, hessians)
    normed = graph.norm(graph.inputs["hidden"], "final_norm", head.norm)
    logits = graph.linear(normed, head.linear, precision)
    if (cap := spec.block.logit_softcap) is not None:  # the norm has divided by it
        logits = graph.op.Tanh(logits)
        logits = graph.op.Mul(logits, graph.activation_tensor("softcap", torch.tensor(cap)))
    return graph.save(folder, head_path(precision), logits=logits)
