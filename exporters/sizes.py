"""What an export would write and need, from the config alone: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig

from dash_onnx.core.actions import SKIP, Action
from dash_onnx.core.errors import SourceError
from dash_onnx.exporters.architectures import architecture_of
from dash_onnx.exporters.architectures.base import Layer, Linear, Norm
from dash_onnx.exporters.calibrate import LENGTH, SEQUENCES
from dash_onnx.exporters.graph_writer import GraphWriter
from dash_onnx.exporters.options import ExportOptions
from dash_onnx.exporters.sources import Source

_GRAPH_BYTES = 6000  # of the nodes of a layer graph
_PROCESS_BYTES = 450 << 20  # Python with torch, transformers and ONNX Runtime


@dataclass(frozen=True)
class Sizes:
    """Estimates in bytes, of weights that are rounded anew.

    Attributes:
        parameters: of the model.
        layers: all layer graphs of an action on disk.
        heads: the LM head of a precision on disk.
        embedding: on disk, as FP16; INT8 rows of a GGUF file take half of it.
        bundle: all files but the text files.
        run: memory of a process that runs all layers in an action, at the start of a context;
            `policy` has every graph loaded.
        kv_per_token: of the K/V cache.
        export: highest memory of the export.
    """

    parameters: int
    layers: dict[Action, int]
    heads: dict[Action, int]
    embedding: int
    bundle: int
    run: dict[str, int]
    kv_per_token: int
    export: int


class _Shapes:
    """Weights of the right shapes, without content or memory."""

    def __init__(self, config: PretrainedConfig):
        """Builds the model's modules, not their weights."""
        with init_empty_weights():
            model: Any = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.shapes:
            raise SourceError(f"the config describes no weight {name!r}")
        return torch.zeros((), dtype=torch.float16).expand(self.shapes[name])

    def packed(self, name: str) -> None:
        """See `Weights`: none has integers."""


def sizes_of(source: Source, options: ExportOptions) -> Sizes:
    """Sizes of the bundle that these options would give, and memory needs.

    Raises:
        DashError: the model or the options would be refused.
    """
    writer = GraphWriter(source, architecture_of(source.config), options)
    spec, facts, variants = writer.spec, writer.spec.facts, options.variants
    weights, rule = _Shapes(source.config), _Rule(writer.options)
    kept = dict.fromkeys((*variants, SKIP), 0)
    widest = 0
    for index in range(facts.num_layers):
        layer = writer.architecture.layer(weights, index, spec)
        for precision in variants:
            kept[precision] += rule.layer(layer, precision)
        kept[SKIP] += rule.skip(layer, writer.rank, facts.num_kv_heads * facts.head_dim)
        widest = max(widest, rule.working(layer))
    head = writer.architecture.head(weights, spec, source.config)
    heads = {p: rule.norms(head.norm) + rule.linear(head.linear, p) for p in variants}
    embedding = 2 * facts.vocab_size * facts.hidden_size
    states = 4 * SEQUENCES * LENGTH * facts.hidden_size
    wide = 2 if options.device == "cpu" else 1  # `full` is FP32 in a CPU's memory
    loaded = {a: size * wide if a == "full" else size for a, size in kept.items()}
    loaded_heads = {a: size * wide if a == "full" else size for a, size in heads.items()}
    run: dict[str, int] = {a: loaded[a] + loaded_heads[a] + embedding for a in variants}
    run["policy"] = sum(loaded.values()) + sum(loaded_heads.values()) + embedding
    return Sizes(
        parameters=sum(torch.Size(shape).numel() for shape in weights.shapes.values()),
        layers=kept,
        heads=heads,
        embedding=embedding,
        bundle=sum(kept.values()) + sum(heads.values()) + embedding,
        run=run,
        kv_per_token=2 * facts.num_layers * facts.num_kv_heads * facts.head_dim * rule.wide,
        export=_PROCESS_BYTES
        + max(2 * embedding + 2 * states, widest, embedding + 2 * max(loaded_heads.values())),
    )


class _Rule:
    """Bytes of parts of graphs, as `graphs` writes them."""

    def __init__(self, options: ExportOptions):
        target = options.target
        self.block = target.block_size
        self.wide = 4 if target.dtype == "float32" else 2  # bytes of an activation
        self.skip_precision: Action = "int4" if "int4" in options.variants else "int8"
        self.hessians = "int4" in options.variants

    def linear(self, linear: Linear, precision: Action) -> int:
        rows, columns = linear.out_features, linear.in_features
        return self.matrix(rows, columns, precision) + (
            0 if linear.bias is None else rows * self.wide
        )

    def matrix(self, rows: int, columns: int, precision: Action) -> int:
        if precision == "full":
            return 2 * rows * columns
        blocks = -(-columns // self.block)
        bits = 8 if precision == "int8" else 4
        zeros = -(-blocks // 2) if precision == "int4" else 0
        return rows * (blocks * self.block * bits // 8 + blocks * self.wide + zeros)

    def norms(self, *norms: Norm | None) -> int:
        found = [t for norm in norms if norm for t in (norm.weight, norm.bias) if t is not None]
        return sum(self.wide * tensor.numel() for tensor in found)

    def layer(self, layer: Layer, precision: Action) -> int:
        linears = (layer.qkv, layer.output, layer.gate_up, layer.down)
        norms = (layer.input_norm, layer.q_norm, layer.k_norm, layer.output_norm, layer.post_norm)
        return (
            sum(self.linear(linear, precision) for linear in linears)
            + self.norms(*norms, layer.down_norm)
            + _GRAPH_BYTES
        )

    def skip(self, layer: Layer, rank: int, keys: int) -> int:
        width = layer.qkv.in_features
        bias = 0 if layer.qkv.bias is None else (2 * keys + rank) * self.wide
        return (
            self.matrix(2 * keys + rank, width, self.skip_precision)
            + (self.matrix(width, rank, "int8") if rank else 0)
            + self.norms(layer.input_norm, layer.k_norm)
            + bias
            + _GRAPH_BYTES
        )

    def working(self, layer: Layer) -> int:
        """Memory while a layer is exported: its weights in FP32 and FP16 and as read, Hessians."""
        linears = (layer.qkv, layer.output, layer.gate_up, layer.down)
        weights = sum(linear.out_features * linear.in_features for linear in linears)
        if not self.hessians:
            return 14 * weights
        squares = [linear.in_features**2 for linear in linears]
        return 14 * weights + 4 * sum(squares) + 16 * max(squares) // 4
