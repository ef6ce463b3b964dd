"""Both ends of the model: the token embedding, and the final norm with the LM head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import helper
from onnx.external_data_helper import uses_external_data

from dash_onnx.core.actions import Form
from dash_onnx.core.contract import EMBED_PATH, TABLE_PATH, embed_ports, head_path, head_ports
from dash_onnx.core.facts import Target
from dash_onnx.exporters.architectures.base import Head, Linear, ModelSpec, Norm, PerLayer
from dash_onnx.exporters.graphs.graph import Graph, fits_half
from dash_onnx.exporters.quantize.blockwise import (
    Matrix,
    Quantized,
    concatenate,
    dequantize,
    quantize,
    row_groups,
)

EXACT_TOKENS: dict[Form, int] = {"int4": 64, "int2": 256}
"""Number of top tokens whose logits a head of this form recomputes from the INT8 head's weights."""

_PREVIEW_BLOCKS = (128, 64)  # of the head that selects these tokens: large blocks are fast
_ROWS = "per_layer.rows"
_EXACT_ROWS = ("exact_values", "exact_scales")


def build_embed(
    folder: Path,
    table: torch.Tensor,
    spec: ModelSpec,
    target: Target,
    per_layer: PerLayer | None = None,
    rounded: bool = False,
) -> list[str]:
    """Writes `embed.onnx` from `[V, D]`; returns `Graph.fp32_kept`.

    It holds FP16 rows, or INT8 rows if those give exactly the same values. ONNX Runtime maps the
    files, and reads only the rows of the input tokens.

    Args:
        folder: folder of the bundle.
        table: the token embedding.
        spec: description of the model.
        target: target of the bundle.
        per_layer: embeddings of the tokens for each layer.
        rounded: whether the table of `per_layer` is INT8, for bundles without `full`.
    """
    graph = Graph("embed", embed_ports(spec.dims(target)), target, spec.block)
    ids = graph.inputs["input_ids"]
    exact = _exact_rows(table, target.block_size)
    if exact is not None:
        rows = _gathered(
            graph,
            graph.tensor("embedding.values", exact.values.reshape(exact.shape)),
            graph.tensor("embedding.scales", exact.scales.astype(np.float16)),
            ids,
        )
    else:
        array = graph.stored_half("embedding", table)
        rows = graph.op.Gather(graph.tensor("embedding", array), ids)
    hidden = graph.op.Cast(rows, to=graph.dtype)
    if spec.scales.embedding != 1.0:
        scale = graph.activation_tensor("embedding_scale", torch.tensor(spec.scales.embedding))
        hidden = graph.op.Mul(hidden, scale)
    if spec.embedding_normed:
        hidden = graph.norm(hidden, "embedding_norm", Norm(torch.ones(table.shape[1])))
    if per_layer is None:
        return graph.save(folder, EMBED_PATH, hidden=hidden)
    block_size = target.block_size if rounded else None
    stored = _write_table(folder / TABLE_PATH, per_layer.table, block_size)
    read = _per_layer(graph, ids, hidden, per_layer, stored)
    kept = graph.save(folder, EMBED_PATH, hidden=hidden, per_layer=read)
    _replace(folder / EMBED_PATH, stored)
    return [*kept, _ROWS] if stored[0].data_type == onnx.TensorProto.FLOAT else kept


def _write_table(path: Path, table: Matrix, block_size: int | None) -> list[onnx.TensorProto]:
    """Writes a table as FP16, or as FP32 if FP16 cannot hold it; returns references to the file.

    With a block size, it is written as INT8 with an FP32 scale for each block of a row.
    """
    if block_size is not None:
        place, place_of_scales = 0, math.prod(table.shape)
        blocks = (table.shape[0], table.shape[1] // block_size)
        stored = [
            _mapped(path, f"{_ROWS}.values", table.shape, onnx.TensorProto.UINT8),
            _mapped(path, f"{_ROWS}.scales", blocks, onnx.TensorProto.FLOAT, place_of_scales),
        ]
        with path.open("wb") as file:
            for part in row_groups(table):
                rows = quantize(part, 8, block_size)
                file.seek(place)
                place += file.write(np.ascontiguousarray(rows.values).data)
                file.seek(place_of_scales)
                place_of_scales += file.write(rows.scales.astype(np.float32).data)
        return stored
    kind = onnx.TensorProto.FLOAT16
    if not _write_rows(path, table, torch.float16):
        kind = onnx.TensorProto.FLOAT
        _write_rows(path, table, torch.float32)
    return [_mapped(path, _ROWS, table.shape, kind)]


def _write_rows(path: Path, table: Matrix, dtype: torch.dtype) -> bool:
    """Writes the rows in order; returns False if they do not fit in FP16 and that is `dtype`."""
    with path.open("wb") as file:
        for part in row_groups(table):
            if dtype == torch.float16 and not fits_half(part):
                return False
            file.write(part.to(dtype).contiguous().numpy().data)
    return True


def _mapped(
    path: Path, name: str, shape: Sequence[int], kind: int, offset: int = 0
) -> onnx.TensorProto:
    """A tensor stored in a file at a byte offset."""
    tensor = onnx.TensorProto(name=name, dims=shape, data_type=kind)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", path.name), ("offset", str(offset))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _replace(path: Path, tensors: Sequence[onnx.TensorProto]) -> None:
    """Replaces the initializers of a graph by tensors of the same names in other files."""
    model = onnx.load(path, load_external_data=False)
    shared = {tensor.name: tensor for tensor in tensors}
    for tensor in model.graph.initializer:
        if tensor.name in shared:
            tensor.CopyFrom(shared[tensor.name])
    path.write_bytes(model.SerializeToString())


def _gathered(graph: Graph, values: ir.Value, scales: ir.Value, ids: ir.Value) -> ir.Value:
    """Rows of an INT8 table, in the type of its scales."""
    return graph.ms.GatherBlockQuantized(
        values,
        ids,
        scales,
        block_size=graph.target.block_size,
        bits=8,
        gather_axis=0,
        quantize_axis=1,
    )


def _per_layer(
    graph: Graph,
    ids: ir.Value,
    hidden: ir.Value,
    part: PerLayer,
    stored: Sequence[onnx.TensorProto],
) -> ir.Value:
    """The embeddings of the tokens for each layer, `[batch, seq, L, P]`."""
    op, size, width = graph.op, part.norm.weight.shape[0], part.projection.in_features
    by_layer = graph.int64(0, 0, -1, size)
    tables = []
    for one in stored:  # a single row, until the graph is saved
        row = np.zeros((1, one.dims[1]), helper.tensor_dtype_to_np_dtype(one.data_type))
        tables.append(graph.tensor(one.name, row))
    values, *scales = tables
    rows = _gathered(graph, values, scales[0], ids) if scales else op.Gather(values, ids)
    rows = op.Cast(rows, to=graph.dtype)
    rows = op.Mul(rows, graph.activation_tensor("per_layer.scale", torch.tensor(part.scale)))
    projected = op.Reshape(graph.linear(hidden, part.projection, "full"), by_layer)
    # Stands for a factor of width ** -0.5 before the norm.
    epsilon = graph.block.norm_epsilon * width
    normed = graph.norm(projected, "per_layer.norm", part.norm, epsilon)
    return op.Add(op.Reshape(rows, by_layer), normed)


def _exact_rows(table: torch.Tensor, block_size: int) -> Quantized | None:
    """INT8 rows with FP16 scales if they reproduce the FP16 rows to the last bit."""
    if table.shape[1] % block_size:
        return None
    parts = []
    for part in row_groups(table):
        if not fits_half(part):
            return None
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
    form: Form,
    hessians: Mapping[str, torch.Tensor],
) -> list[str]:
    """Writes `head/{full,int8,int4,int2,wide}.onnx`; returns `Graph.fp32_kept`.

    If the folder holds the INT8 head, heads of fewer bits recompute the logits of the top tokens
    from its weights, which all share: see docs/decisions/0085.
    """
    ports = head_ports(spec.dims(target))
    graph = Graph(f"head_{form}", ports, target, spec.block, hessians)
    normed = graph.norm(graph.inputs["hidden"], "final_norm", head.norm)
    exact = _exact_rows_of(folder, head, target) if form in EXACT_TOKENS else []
    if exact:
        logits = _previewed(graph, normed, head.linear, form)
    else:
        logits = graph.linear(normed, head.linear, form)
    if (cap := spec.block.logit_softcap) is not None:  # the norm has divided by it
        logits = graph.op.Tanh(logits)
        logits = graph.op.Mul(logits, graph.activation_tensor("softcap", torch.tensor(cap)))
    kept = graph.save(folder, head_path(form), logits=logits)
    if exact:
        _replace(folder / head_path(form), exact)
    return kept


def preview_block(columns: int, block_size: int) -> int:
    """Block size of a head that rescores, see `rescores`."""
    return next(size for size in (*_PREVIEW_BLOCKS, block_size) if columns % size == 0)


def rescores(graph: Path) -> bool:
    """Whether a head rescores its top tokens with the weights of the INT8 head."""
    stored = onnx.load(graph, load_external_data=False).graph.initializer
    return any(tensor.name in _EXACT_ROWS for tensor in stored)


def _exact_rows_of(folder: Path, head: Head, target: Target) -> list[onnx.TensorProto]:
    """Values and scales of the INT8 head by row, in its own file; none if they cannot be used."""
    file, (rows, columns) = folder / head_path("int8"), head.linear.weight.shape
    if not file.is_file() or target.device != "cpu" or head.linear.bias is not None:
        return []
    found = {t.name: t for t in onnx.load(file, load_external_data=False).graph.initializer}
    parts = [found["lm_head.values"], found["lm_head.scales"]]
    if columns % target.block_size or not all(uses_external_data(part) for part in parts):
        return []
    for part, name, width in zip(
        parts, _EXACT_ROWS, (columns, columns // target.block_size), strict=True
    ):
        part.name = name
        part.dims[:] = (rows, width)
    return parts


def _previewed(graph: Graph, normed: ir.Value, linear: Linear, precision: Form) -> ir.Value:
    """Low-bit logits, with those of the top tokens recomputed from the rows of the INT8 head."""
    op, (rows, columns), block = graph.op, linear.weight.shape, graph.target.block_size
    logits = graph.linear(normed, linear, precision, preview_block(columns, block))
    _, likeliest = op.TopK(
        logits,
        graph.int64(min(EXACT_TOKENS[precision], rows)),
        sorted=0,
        _outputs=[graph.value("likely_logits"), graph.value("likely_tokens")],
    )
    # Placeholders, until the file is known.
    nothing: list[np.ndarray] = [np.zeros(1, np.uint8), np.zeros(1, np.float32)]
    values, scales = map(graph.tensor, _EXACT_ROWS, nothing)
    weights = _gathered(graph, values, scales, likeliest)  # [batch, seq, tokens, D]
    exact = op.MatMul(weights, op.Unsqueeze(normed, graph.int64(-1)))
    return op.ScatterElements(logits, likeliest, op.Squeeze(exact, graph.int64(-1)), axis=-1)
