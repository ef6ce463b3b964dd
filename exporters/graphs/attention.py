"""Attention over the K/V cache, including writes of the new tokens, in the forms that ORT has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from dash_onnx.core.block import QueryScale
from dash_onnx.exporters.graphs.graph import Graph

ATTENTION = "attention"
"""Name of the value that holds the heads' outputs."""


@dataclass(frozen=True, kw_only=True)
class KVQuantization:
    """How the cache of a layer rounds keys and values.

    Attributes:
        key_scale: step sizes of the keys' channels, `[H_kv, 1, d]`.
        value_scale: those of the values.
        key_offset: what the cache's keys lack, `[H_kv, 1, d]`, or None. It lowers all scores of a
            query alike, and so changes no share of a softmax over nothing but scores.
    """

    key_scale: npt.NDArray[np.float32]
    value_scale: npt.NDArray[np.float32]
    key_offset: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True)
class Heads:
    """How the heads of a layer attend.

    Attributes:
        queries: number of heads H.
        keys: number of key/value heads H_kv.
        size: width of a head d.
        rotated: dimensions of a head that the rotary embedding rotates; 0 for none.
        softcap: softcap of the scaled scores, or None.
        window: most tokens that a token sees, including itself, or None.
        sinks: `[H]`, see `Layer`, a value of the graph; or None.
        shared: whether they read K/V written by another layer, including those of new tokens.
    """

    queries: int
    keys: int
    size: int
    rotated: int
    softcap: float | None = None
    window: int | None = None
    sinks: ir.Value | None = None
    shared: bool = False


def attend(
    graph: Graph,
    projected: Sequence[ir.Value | None],
    heads: Heads,
    kv: KVQuantization | None = None,
    name: str = ATTENTION,
) -> Sequence[ir.Value]:
    """Attention in both forms where both are possible: the runtime knows which one is faster.

    Args:
        graph: graph with the ports of a layer.
        projected: queries, keys and values `[batch, seq, ...]`; or all three stacked, then None
            twice; or only queries where K/V are shared.
        heads: how they attend.
        kv: how a quantized cache rounds.
        name: name of the heads' outputs.

    Returns:
        The heads' outputs `[batch, seq, H * d]`, and K and V of all tokens, unless shared.
    """
    names = (name,) if heads.shared else (name, "present_key", "present_value")
    if (scale := graph.block.query_scale) is not None:
        query, *others = projected
        projected = [_scaled(graph, query, scale), *others]
    if graph.target.attention == "grouped":
        return attend_grouped(graph, projected, heads, names, kv)
    made = graph.either(
        graph.inputs["plain"],
        lambda: attend_plainly(graph, projected, heads),
        lambda: attend_grouped(graph, projected, heads, names),
        names,
    )
    return [made] if heads.shared else made


def attend_grouped(
    graph: Graph,
    projected: Sequence[ir.Value | None],
    heads: Heads,
    names: Sequence[str],
    kv: KVQuantization | None = None,
) -> Sequence[ir.Value]:
    """GroupQueryAttention, which needs little memory for many rows; see `attend`."""
    inputs, cache = graph.inputs, graph.target.kv_cache
    extras: list[ir.Value | None] = []  # positions, bias, sinks, scales, norms, counts
    options: dict[str, str | int | float] = {}
    if cache != "float":
        assert kv is not None
        keys = graph.tensor("k_scale", kv.key_scale)
        values = graph.tensor("v_scale", kv.value_scale)
        extras = [None, None, None, keys, values]
        bits = 8 if cache == "int8" else 4
        kind = "PER_CHANNEL"
        options = {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": bits}
        if kv.key_offset is not None:
            projected, heads = _centered(graph, projected, heads, kv.key_offset)
    if heads.sinks is not None:
        extras = [None, None, heads.sinks, *extras[3:]]
    if heads.shared:  # no new keys and values: the new tokens are the last in the cache
        query, end = projected[0], graph.int64(0, heads.keys * heads.size)
        nothing = graph.op.Slice(query, graph.int64(0, 0), end, graph.int64(1, 2))
        projected = [query, nothing, nothing]
    elif graph.target.ragged:  # unsupported by ONNX Runtime without new keys
        extras = [*extras, *[None] * (7 - len(extras)), inputs["query_seqlens"]]
    if graph.block.attention_scale != heads.size**-0.5:
        options["scale"] = graph.block.attention_scale
    if heads.softcap is not None:
        options["softcap"] = heads.softcap
    if heads.window is not None:
        options["local_window_size"] = heads.window
    made = graph.ms.GroupQueryAttention(
        *projected,
        inputs["past_key"],
        inputs["past_value"],
        inputs["seqlens_k"],
        inputs["total_sequence_length"],
        inputs["cos_cache"] if heads.rotated else None,
        inputs["sin_cache"] if heads.rotated else None,
        *extras,
        num_heads=heads.queries,
        kv_num_heads=heads.keys,
        do_rotary=int(heads.rotated > 0),
        **options,
        _outputs=[graph.value(name) for name in names],
    )
    return [made] if len(names) == 1 else made


def attend_plainly(
    graph: Graph, projected: Sequence[ir.Value | None], heads: Heads
) -> Sequence[ir.Value]:
    """The same with plain operators, over the cache's whole capacity: faster for few rows.

    The queries of a key/value head are rows of one product with all its keys, so keys are read only
    once. The mask hides what a token does not see.
    """
    op = graph.op
    query, key, value = (*projected, None, None)[:3]
    if heads.shared:
        written = [graph.inputs["past_key"], graph.inputs["past_value"]]
    elif key is None or value is None:
        query, key, value = _apart(graph, query, heads)
    if not heads.shared:
        written = write_kv(graph, key, value, heads)
    present_key, present_value = written
    query = rotated(graph, query, heads, heads.queries)
    group = heads.queries // heads.keys
    # [batch, seq, H * d] -> [batch, H_kv, group * seq, d]
    query = op.Reshape(query, graph.int64(0, 0, heads.keys, group, heads.size))
    query = op.Transpose(query, perm=[0, 2, 3, 1, 4])
    query = op.Reshape(query, graph.int64(0, heads.keys, -1, heads.size))
    scale = graph.block.attention_scale
    scores = graph.ms.FusedMatMul(query, present_key, transB=1, alpha=scale)
    if heads.softcap is not None:
        cap = graph.tensor("attention_softcap", np.array(heads.softcap, np.float32))
        scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
    # [batch, H_kv, group, seq, capacity] + [batch, 1, 1, seq, capacity]
    mask = graph.inputs["mask"]
    apart = op.Concat(graph.int64(0, heads.keys, group), op.Shape(mask, start=3, end=5), axis=0)
    masked = op.Add(op.Reshape(scores, apart), mask)
    if heads.sinks is None:
        shares = op.Softmax(masked, axis=-1)
    else:
        one = op.Concat(op.Shape(masked, end=4), graph.int64(1), axis=0)
        sinks = op.Reshape(heads.sinks, graph.int64(1, heads.keys, group, 1, 1))
        shares = op.Softmax(op.Concat(masked, op.Expand(sinks, one), axis=-1), axis=-1)
        shares = op.Slice(shares, graph.int64(0), graph.int64(-1), graph.int64(-1))
    mixed = op.MatMul(op.Reshape(shares, op.Shape(scores)), present_value)
    mixed = op.Reshape(mixed, graph.int64(0, heads.keys, group, -1, heads.size))
    mixed = op.Transpose(mixed, perm=[0, 3, 1, 2, 4])
    attended = op.Reshape(mixed, graph.int64(0, 0, heads.queries * heads.size))
    return [attended] if heads.shared else [attended, present_key, present_value]


def _apart(graph: Graph, stacked: ir.Value | None, heads: Heads) -> Sequence[ir.Value]:
    """Queries, keys and values, which a product returned as one."""
    widths = [heads.queries * heads.size, *[heads.keys * heads.size] * 2]
    return graph.split(stacked, widths, "rows")


def _centered(
    graph: Graph,
    projected: Sequence[ir.Value | None],
    heads: Heads,
    offset: npt.NDArray[np.float32],
) -> tuple[Sequence[ir.Value | None], Heads]:
    """Rotated queries and keys, the keys without an offset; and heads with nothing to rotate."""
    query, key, value = projected
    if key is None:
        query, key, value = _apart(graph, query, heads)
    query = rotated(graph, query, heads, heads.queries)
    key = rotated(graph, key, heads, heads.keys)
    common = graph.activation_tensor("k_offset", torch.from_numpy(offset.reshape(-1)))
    return [query, graph.op.Sub(key, common), value], replace(heads, rotated=0)


def write_kv(graph: Graph, key: ir.Value, value: ir.Value, heads: Heads) -> list[ir.Value]:
    """Rotates the keys and writes both, `[batch, seq, H_kv * d]`, into the cache."""
    op, inputs = graph.op, graph.inputs
    shape = graph.int64(0, 0, heads.keys, heads.size)
    written = []
    for name, update in (("key", rotated(graph, key, heads, heads.keys)), ("value", value)):
        update = op.Transpose(op.Reshape(update, shape), perm=[0, 2, 1, 3])  # [B, H_kv, S, d]
        past = inputs[f"past_{name}"]
        written.append(op.TensorScatter(past, update, inputs["start"], axis=2))
    return written


def rotated(graph: Graph, x: ir.Value, heads: Heads, count: int) -> ir.Value:
    """Queries or keys `[batch, seq, count * d]`, each rotated by its position."""
    if not heads.rotated:
        return x
    partly = heads.rotated != heads.size
    return graph.ms.RotaryEmbedding(
        x,
        graph.inputs["positions"],
        graph.inputs["cos_cache"],
        graph.inputs["sin_cache"],
        num_heads=count,
        rotary_embedding_dim=heads.rotated if partly else 0,
    )


def _scaled(graph: Graph, query: ir.Value | None, scale: QueryScale) -> ir.Value:
    """Queries `[batch, seq, H * d]`, each times the factor of its position."""
    op = graph.op
    numbers = {"length": scale.length, "beta": scale.beta, "one": 1.0}
    length, beta, one = (
        graph.tensor(f"query_scale.{name}", np.array(value, np.float32))
        for name, value in numbers.items()
    )
    blocks = op.Floor(op.Div(op.Cast(graph.inputs["positions"], to=ir.DataType.FLOAT), length))
    factor = op.Add(op.Mul(op.Log(op.Add(blocks, one)), beta), one)
    factor = op.Cast(op.Unsqueeze(factor, graph.int64(-1)), to=graph.dtype)
    return op.Mul(query, factor, _outputs=[graph.value("query.scaled")])
