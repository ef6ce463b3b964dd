"""The contract of the graphs: names, dtypes and shapes of every input and output.

The exporter declares the ports of a graph from here and the runtime binds them from
here, so the two cannot drift apart. A graph has those inputs of its kind that it reads, in this
order. `batch`, `seq`, `capacity` and `limit` are symbolic dimensions. The sequences of a batch
take the same actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from dash_onnx.core.actions import Form
from dash_onnx.core.block import ATTENTIONS, Attention, Mixer, Recurrence
from dash_onnx.core.facts import KVCacheType, ModelFacts, Rope, Target

Size = TypeVar("Size", int, str)

DType = Literal["float32", "float16", "int8", "uint8", "int32", "int64", "bool"]

EMBED_PATH = "embed.onnx"

TABLE_PATH = "embed.onnx.table"
"""What layers read from the tokens, by token: large, and never read as a whole."""

FUSED_FOLDER, REPORT_NAME, CARD_NAME = "fused", "report.html", "README.md"
"""What dash-fuse, dash-report and dash-export add to a bundle's folder: not part of the bundle."""

SOURCE_FOLDER = "source"
"""Folder in the bundle for the license and the model card of the source model."""


def layer_path(layer: int, form: Form) -> str:
    """Path of a layer graph inside the bundle."""
    return f"layers/{layer:02d}/{form}.onnx"


def head_path(form: Form) -> str:
    """Path of a head graph (final norm and LM head) inside the bundle."""
    return f"head/{form}.onnx"


def data_name(graph: str) -> str:
    """Path of the external weights of a graph: `layers/00/int4.onnx` -> `….onnx.data`."""
    return graph + ".data"


_INT8_ROWS = data_name(head_path("int8"))
SHARED_DATA = {head_path("int4"): _INT8_ROWS, head_path("int2"): _INT8_ROWS}
"""By graph, the weights of another one that it may read too: heads take rows of the INT8 head."""


def scorer_path(digest: str) -> str:
    """Path of a scorer graph, named after its content: a new one never overwrites the old one."""
    return f"scorer-{digest[:12]}.onnx"


@dataclass(frozen=True)
class Port:
    """One input or output of a graph.

    Attributes:
        name: its name in the graph.
        dtype: its element type.
        shape: its dimensions; a string is a symbolic one.
    """

    name: str
    dtype: DType
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Ports:
    """All inputs and outputs of a graph, in order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclass(frozen=True)
class Dims:
    """The sizes that the ports of a model's graphs depend on, or those of one layer.

    Attributes:
        hidden_size: width D of the residual stream.
        num_kv_heads: number of key/value heads.
        head_dim: width d of one head.
        rotary_dim: how many of the d dimensions are rotated.
        vocab_size: number V of logits.
        dtype: element type of hidden states and logits.
        kv_cache: element type of K/V.
        recurrence: sizes of the layers without K/V, or None.
        per_layer: number of layers, and width of what each reads from the tokens; or None.
    """

    hidden_size: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    vocab_size: int
    dtype: DType
    kv_cache: KVCacheType = "float"
    recurrence: Recurrence | None = None
    per_layer: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        model: ModelFacts,
        ropes: Sequence[Rope],
        target: Target,
        recurrence: Recurrence | None = None,
        per_layer_width: int = 0,
        attention: Attention | None = None,
    ) -> Dims:
        """The sizes of a model, or of a layer with its attention."""
        heads = (model.num_kv_heads, model.head_dim)
        kv_heads, head_dim = heads if attention is None else model.heads_of(attention)
        rope = ropes[0 if attention is None else attention.rope or 0]
        return cls(
            hidden_size=model.hidden_size,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rotary_dim=2 * len(rope.inv_freq),
            vocab_size=model.vocab_size,
            dtype=target.dtype,
            kv_cache=target.kv_cache,
            recurrence=recurrence,
            per_layer=(model.num_layers, per_layer_width) if per_layer_width else None,
        )

    @property
    def cache_dtype(self) -> DType:
        """Element type of the K/V cache's buffers."""
        stored: dict[KVCacheType, DType] = {"int8": "int8", "int4": "uint8"}
        return stored.get(self.kv_cache, self.dtype)

    def cache_shape(self, batch: Size, capacity: Size) -> tuple[int | Size, ...]:
        """Shape of the keys of a layer, or of its values; two INT4 numbers share a byte."""
        width = self.head_dim // 2 if self.kv_cache == "int4" else self.head_dim
        return batch, self.num_kv_heads, capacity, width

    def state_shapes(self, mixer: Mixer) -> dict[str, tuple[int, ...]]:
        """By name, the states of one sequence that a layer keeps in place of K/V, in `dtype`.

        `conv` holds the convolution's inputs for the last tokens, `recurrent` the matrices of Gated
        DeltaNet.
        """
        sizes = self.recurrence
        if mixer in ATTENTIONS or sizes is None:
            return {}
        conv: dict[str, tuple[int, ...]] = {"conv": (sizes.kernel - 1, sizes.channels)}
        if mixer == "short_conv":
            return conv
        return {**conv, "recurrent": (sizes.value_heads, sizes.key_dim, sizes.value_dim)}


def embed_ports(dims: Dims) -> Ports:
    """Token embedding: ids `[batch, seq]` -> hidden `[batch, seq, D]`.

    And `per_layer` `[batch, seq, L, P]`, if layers read something from the tokens themselves.
    """
    return Ports(
        inputs=(Port("input_ids", "int64", ("batch", "seq")),),
        outputs=(
            Port("hidden", dims.dtype, ("batch", "seq", dims.hidden_size)),
            *_per_layer_ports(dims),
        ),
    )


def _per_layer_ports(dims: Dims) -> tuple[Port, ...]:
    if dims.per_layer is None:
        return ()
    return (Port("per_layer", dims.dtype, ("batch", "seq", *dims.per_layer)),)


def layer_ports(dims: Dims, mixer: Mixer = "attention") -> Ports:
    """Decoder layer, whatever its action.

    A layer without attention reads `past_conv`, and `past_recurrent` if it is a Gated DeltaNet, and
    writes `present_conv` and `present_recurrent`, see `Dims.state_shapes`. One with shared
    attention has the inputs of attention, with K/V of another layer as `past_key` and `past_value`,
    which hold the new tokens already; it writes none. `per_layer` is what the token embedding
    returns for all layers.

    In a layer with attention, `past_key`/`present_key` and `past_value`/`present_value` are bound
    to the same buffers and updated in place; `capacity` is their length in tokens. `seqlens_k` is
    the number of valid tokens after this run minus one (GroupQueryAttention's convention), `start`
    the number before it: where new K/V are written; of `seq` new tokens, `query_seqlens` are valid,
    the rest pads a sequence that has fewer than others. `positions` are those of the new tokens,
    and `mask` is added to their scores: zero where a token sees another one, minus infinity
    elsewhere. `plain` chooses between two implementations of attention: plain operators, which read
    the mask and write at `start`, and GroupQueryAttention, which reads neither.
    """
    hidden = ("batch", "seq", dims.hidden_size)
    if mixer not in ATTENTIONS:
        shapes = dims.state_shapes(mixer)
        past, present = (
            [
                Port(f"{side}_{name}", dims.dtype, ("batch", *shape))
                for name, shape in shapes.items()
            ]
            for side in ("past", "present")
        )
        return Ports(
            inputs=(Port("hidden_in", dims.dtype, hidden), *past),
            outputs=(Port("hidden_out", dims.dtype, hidden), *present),
        )
    cache = dims.cache_shape("batch", "capacity")
    rotary = ("limit", dims.rotary_dim // 2)
    written = ("present_key", "present_value") if mixer == "attention" else ()
    return Ports(
        inputs=(
            Port("hidden_in", dims.dtype, hidden),
            Port("past_key", dims.cache_dtype, cache),
            Port("past_value", dims.cache_dtype, cache),
            Port("seqlens_k", "int32", ("batch",)),
            Port("total_sequence_length", "int32", ()),
            Port("query_seqlens", "int32", ("batch",)),
            Port("start", "int64", ("batch",)),
            Port("positions", "int64", ("batch", "seq")),
            Port("mask", "float32", ("batch", 1, 1, "seq", "capacity")),
            Port("plain", "bool", ()),
            Port("cos_cache", dims.dtype, rotary),
            Port("sin_cache", dims.dtype, rotary),
            *_per_layer_ports(dims),
        ),
        outputs=(
            Port("hidden_out", dims.dtype, hidden),
            *(Port(name, dims.cache_dtype, cache) for name in written),
        ),
    )


_KEPT = "key", "value", "conv", "recurrent"
"""What layers keep of earlier tokens."""


def joined_names(layer: int, attention: Attention, layers: range) -> dict[str, str]:
    """What the ports of a layer are called in a graph of several layers.

    Each layer has its own cache or states, or reads what another one has written; layers with the
    same window share a mask, and those with the same rotary embedding its tables. The other ports
    are shared by all.

    Args:
        layer: its index.
        attention: attention of the layer.
        layers: those of the graph.
    """
    kept = [f"{side}_{name}" for side in ("past", "present") for name in _KEPT]
    names = {name: f"{name}.{layer}" for name in kept}
    if (source := attention.source) is not None:
        side = "present" if source in layers else "past"
        names |= {f"past_{name}": f"{side}_{name}.{source}" for name in ("key", "value")}
    if attention.window is not None:
        names["mask"] = f"mask.{attention.window}"
    cos, sin = rotary_names(attention.rope or 0)
    return {**names, "cos_cache": cos, "sin_cache": sin}


def rotary_names(rope: int) -> tuple[str, str]:
    """Names of the tables of a rotary embedding, where a graph has several."""
    suffix = f".{rope}" if rope else ""
    return f"cos_cache{suffix}", f"sin_cache{suffix}"


def joined_ports(each: Sequence[Ports], names: Sequence[dict[str, str]]) -> Ports:
    """Several consecutive layers: their ports as in `layer_ports`, with each layer's names."""

    def joined(sides: Sequence[tuple[Port, ...]]) -> tuple[Port, ...]:
        found = [
            replace(port, name=own.get(port.name, port.name))
            for own, side in zip(names, sides, strict=True)
            for port in side
        ]
        return tuple({port.name: port for port in found}.values())

    inputs, outputs = joined([p.inputs for p in each]), joined([p.outputs for p in each])
    made = {port.name for port in outputs}
    return Ports(tuple(port for port in inputs if port.name not in made), outputs)


def head_ports(dims: Dims) -> Ports:
    """Final norm and LM head: hidden `[batch, seq, D]` -> logits `[batch, seq, V]`."""
    return Ports(
        inputs=(Port("hidden", dims.dtype, ("batch", "seq", dims.hidden_size)),),
        outputs=(Port("logits", dims.dtype, ("batch", "seq", dims.vocab_size)),),
    )


def scorer_ports(dims: Dims, layers: int, actions: int) -> Ports:
    """The scorer of one token's decisions for a segment of layers.

    `hidden` is the input of the layer before the segment, `penalty` what each action costs in nats
    (multiplier times cost). `total` is `penalty` plus the predicted KL of each action in nats,
    `action` the index of the least. Both have a row for every layer; those of the first segment
    depend on the penalty alone, and those of any other segment than the input's are meaningless.
    """
    rows = (layers, actions)
    return Ports(
        inputs=(
            Port("hidden", dims.dtype, (1, dims.hidden_size)),
            Port("penalty", "float32", rows),
        ),
        outputs=(Port("total", "float32", rows), Port("action", "int64", (layers,))),
    )
