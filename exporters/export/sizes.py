"""Estimates what an export would write and need, from config and shapes: no weight is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dash_onnx.core.actions import SKIP, WIDE, WIDENED, Action, Form
from dash_onnx.core.errors import UnsupportedError
from dash_onnx.exporters.architectures import architecture_of
from dash_onnx.exporters.architectures.base import (
    Conv,
    Delta,
    Head,
    Layer,
    Linear,
    Mixture,
    Norm,
)
from dash_onnx.exporters.calibration.self_written import KV_BYTES
from dash_onnx.exporters.calibration.tokens import LENGTH, sequences_of
from dash_onnx.exporters.export.options import ExportOptions
from dash_onnx.exporters.graphs import kept_rows
from dash_onnx.exporters.graphs.ends import EXACT_TOKENS, preview_block
from dash_onnx.exporters.graphs.graph import BITS, FOLDED, block_size_of, weight_precision
from dash_onnx.exporters.sources import Source, Weights, Wrapped

_GRAPH_BYTES = 6000  # nodes of a layer graph
_PREVIEW_BYTES = 3700  # nodes of a head that rescores
_PROCESS_BYTES = 450 << 20  # Python with torch, transformers and ONNX Runtime
_TOKEN_BYTES = 4000  # per vocabulary entry, while a tokenizer is built
_ENDS = 11  # bytes per weight of the embedding or the LM head while it is exported
_RUNTIME_BYTES = 120 << 20  # Python with ONNX Runtime
_LOADED_TOKEN_BYTES = 1000  # per vocabulary entry of its tokenizer


@dataclass(frozen=True)
class Sizes:
    """Estimates in bytes, for requantized weights.

    Attributes:
        parameters: number of parameters of the model.
        layers: by form, all layer graphs on disk.
        read: by form, the part of them that a token reads: of experts, only those that it takes.
        heads: by form, the LM head on disk.
        embedding: on disk, as FP16; INT8 rows of a GGUF file take half of that.
        bundle: all files except the text files.
        work: additional disk space until the export is done.
        run: by action, memory of a process that runs all layers in it, at the start of a context;
            `policy` loads every action. Includes the wide form of layers and LM head for those
            that use it, unless `memory="low"` leaves it out.
        kv_per_token: K/V cache per token.
        export: peak memory of the export.
    """

    parameters: int
    layers: dict[Form, int]
    read: dict[Form, int]
    heads: dict[Form, int]
    embedding: int
    bundle: int
    work: int
    run: dict[str, int]
    kv_per_token: int
    export: int


class _Empty(Wrapped):
    """Weights of the right shapes, without content or memory.

    Attributes:
        parameters: number of them in each tensor that was looked up, by name.
    """

    def __init__(self, weights: Weights):
        """Wraps the weights of a model."""
        super().__init__(weights)
        self.parameters: dict[str, int] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = torch.empty(self.stored.shape(name), dtype=torch.float16, device="meta")
        self.parameters[name] = tensor.numel()
        return tensor

    def packed(self, name: str) -> None:
        """See `Weights`: none has integers."""


def sizes_of(source: Source, options: ExportOptions) -> Sizes:
    """Sizes and memory needs of the bundle that these options would give.

    Raises:
        DashError: the model or the options would be refused.
    """
    architecture, weights = architecture_of(source.config), _Empty(source.weights)
    spec = architecture.describe(source.name, source.config, options.max_length)
    architecture.embedding(weights, spec)
    kinds = ", ".join(sorted({*spec.mixers} - {"attention"}))
    if (kinds or spec.block.per_layer_width) and options.device != "cpu":
        raise UnsupportedError(
            f"layers {'of kind ' + kinds if kinds else 'with embeddings of their own'} run only on "
            "the CPU: export with --device cpu"
        )
    if "shared_attention" in spec.mixers and options.kv_cache != "float":
        raise UnsupportedError(
            "K/V shared by several layers cannot be quantized: leave --kv-cache out"
        )
    facts = spec.facts
    head = architecture.head(weights, spec)
    if getattr(source.config, "tie_word_embeddings", False):  # some files store it again
        weights.parameters.pop(f"{architecture.names.head}.weight", None)
    resolved = options.resolved(source.kind, spec)
    forms, variants = resolved.forms, resolved.variants
    rule = _Rule(resolved, resolved.head_precisions(facts, head.linear.bias is not None))
    kept: dict[Form, int] = dict.fromkeys((*forms, SKIP), 0)
    idle: dict[Form, int] = dict.fromkeys(kept, 0)
    experts = spec.block.experts
    unused = 1 - experts.per_token / experts.count if experts else 0.0
    widest = draft = surplus = 0
    for index in range(facts.num_layers):
        layer = architecture.layer(weights, index, spec)
        for form in forms:
            kept[form] += rule.layer(form, layer) + _GRAPH_BYTES
            idle[form] += round(unused * rule.experts(form, layer))
        kept[SKIP] += rule.skip(layer, sum(kept_rows(spec, index)[1])) + _GRAPH_BYTES
        surplus += 2 * rule.unfolded(layer)
        draft += rule.layer("int8", layer)
        widest = max(widest, rule.working(layer.linears))
    head_forms: tuple[Form, ...] = (*rule.heads, *((WIDE,) if resolved.wide else ()))
    heads = {form: rule.head(form, head) for form in head_forms}
    embedding = 2 * facts.vocab_size * facts.hidden_size
    ends = _ENDS * embedding // 2
    if (per_layer := architecture.per_layer(weights, spec)) is not None:
        projection = rule.stored("full", per_layer.projection, per_layer.norm)
        count = weights.parameters["per_layer"] = math.prod(per_layer.table.shape)
        scales = 4 * count // (resolved.block_size or 1)
        embedding += projection + (2 * count if "full" in variants else count + scales)
    tokens = sequences_of(facts, resolved.exact) * LENGTH
    states = 4 * tokens * facts.hidden_size
    attending = [index for index in range(facts.num_layers) if spec.mixer_of(index) == "attention"]
    kv = 2 * sum(math.prod(spec.heads_of(index)) for index in attending)
    sources = {one.source for one in spec.attention}  # whose K/V other layers read, see `Runner`
    read = sum(math.prod(spec.heads_of(index)) for index in attending if index in sources)
    states += 4 * tokens * read
    kept_kv = int(kv * {"float": rule.wide, "int8": 1, "int4": 0.5}[options.kv_cache])
    draft += embedding + rule.stored("int8", head.norm, head.linear)
    wide = 2 if options.device == "cpu" else 1  # on a CPU, `full` is FP32 in memory
    loaded, loaded_heads = (
        {form: size * (wide if form == "full" else 1) for form, size in sizes.items()}
        for sizes in (kept, heads)
    )
    if "full" in kept:  # in memory it is FP32 anyway
        kept["full"] += surplus
    many_head = loaded_heads.get(WIDE, 0)
    many = loaded.get(WIDE, 0) + many_head
    mixed = loaded_heads["int8" if "int8" in heads else rule.heads[0]]
    process = _RUNTIME_BYTES + _LOADED_TOKEN_BYTES * facts.vocab_size
    run: dict[str, int] = {
        a: process
        + loaded[a]
        + (loaded_heads[a] if a == "full" else mixed)
        + (many if a in WIDENED else 0)
        for a in variants
    }
    run["policy"] = process + sum(loaded.values()) + mixed + many_head
    text = 0 if options.calibration else draft - embedding + min(KV_BYTES, tokens * kv * rule.wide)
    return Sizes(
        parameters=sum(weights.parameters.values()),
        layers=kept,
        read={form: size - idle[form] for form, size in kept.items()},
        heads=heads,
        embedding=embedding,
        bundle=sum(kept.values()) + sum(heads.values()) + embedding,
        work=2 * states + (0 if options.calibration else draft),
        run=run,
        kv_per_token=kept_kv,
        export=_PROCESS_BYTES + _TOKEN_BYTES * facts.vocab_size + max(ends, text, widest),
    )


class _Rule:
    """Bytes of parts of graphs, as `graphs` writes them."""

    def __init__(self, options: ExportOptions, heads: tuple[Action, ...]):
        target = options.target
        self.target, self.rank = target, options.compensation_rank or 0
        self.wide = 4 if target.dtype == "float32" else 2  # bytes of an activation
        self.hessians = options.calibrates
        self.heads = heads

    def layer(self, form: Form, layer: Layer) -> int:
        parts = [part for part in vars(layer).values() if not isinstance(part, Delta | Mixture)]
        mixture = layer.mixture
        routing = () if mixture is None else (mixture.router, mixture.shared_gate)
        exact = self.stored("full", *routing) + self.delta(layer)  # never rounded
        return self.stored(form, *parts) + self.experts(form, layer) + exact

    def delta(self, layer: Layer) -> int:
        return 0 if layer.delta is None else self.stored("full", *vars(layer.delta).values())

    def experts(self, form: Form, layer: Layer) -> int:
        mixture = layer.mixture
        return 0 if mixture is None else self.stored(form, mixture.up, mixture.down)

    def unfolded(self, layer: Layer) -> int:
        """Weights of experts that `full` stores in FP32: see `graphs.mixture`."""
        mixture = layer.mixture
        sizes = [] if mixture is None else [p.weight.numel() for p in (mixture.up, mixture.down)]
        return sum(size for size in sizes if size > FOLDED)

    def stored(self, form: Form, *parts: Linear | Norm | Conv | torch.Tensor | None) -> int:
        size = 0
        for part in parts:
            if isinstance(part, Linear):
                kept = weight_precision(form, part.name, self.target.ternary)
                size += self.matrix(part.out_features, part.in_features, kept)
            elif isinstance(part, Norm | Conv):
                size += self.wide * part.weight.numel()
            elif part is not None:
                size += self.wide * part.numel()
            if isinstance(part, Linear | Norm | Conv) and part.bias is not None:
                size += self.wide * part.bias.numel()
        return size

    def head(self, form: Form, head: Head) -> int:
        size, linear = self.stored(form, head.norm, head.linear), head.linear
        previews = form in EXACT_TOKENS and self.target.device == "cpu"
        if not previews or "int8" not in self.heads or linear.bias is not None:
            return size
        rows, columns = linear.out_features, linear.in_features
        block = preview_block(columns, self.target.block_size)
        preview = self.matrix(rows, columns, form, block)
        return size - self.matrix(rows, columns, form) + preview + _PREVIEW_BYTES

    def matrix(self, rows: int, columns: int, form: Form, block_size: int | None = None) -> int:
        if form == "full":
            return 2 * rows * columns
        if form == WIDE:
            return rows * (columns + 4)
        bits = BITS[form]
        block = block_size or block_size_of(bits, self.target.block_size, columns)
        blocks = -(-columns // block)
        zeros = -(-blocks * bits // 8) if bits < 8 else 0
        return rows * (blocks * block * bits // 8 + blocks * self.wide + zeros)

    def skip(self, layer: Layer, kept: int) -> int:
        width, rows = layer.qkv.in_features, kept + self.rank
        return (
            self.matrix(rows, width, "int4" if self.hessians else "int8")
            + self.matrix(width, self.rank, "int8")
            + self.stored("full", layer.input_norm, layer.k_norm, layer.v_norm)
            + (0 if layer.qkv.bias is None else rows * self.wide)
            + (0 if layer.delta is None else self.stored("full", layer.conv) + self.delta(layer))
        )

    def working(self, linears: Sequence[Linear]) -> int:
        """Memory while a layer is exported: weights in FP32, in FP16 and as read, and Hessians."""
        weights = sum(linear.out_features * linear.in_features for linear in linears)
        squares = [linear.in_features**2 for linear in linears] if self.hessians else [0]
        return 14 * weights + 4 * sum(squares) + 4 * max(squares)
