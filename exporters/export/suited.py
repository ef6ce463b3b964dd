"""Options that suit a model, by its weights: whether they are ternary, or four bits already."""

from __future__ import annotations

from dataclasses import replace

from dash_onnx.exporters.architectures.base import ModelSpec
from dash_onnx.exporters.architectures.decoder import Decoder
from dash_onnx.exporters.export.options import ExportOptions
from dash_onnx.exporters.graphs.graph import block_size_of
from dash_onnx.exporters.quantize.blockwise import Bits
from dash_onnx.exporters.quantize.ternary import ternary
from dash_onnx.exporters.sources import Source


def suited(
    options: ExportOptions,
    source: Source,
    architecture: Decoder,
    spec: ModelSpec,
    layers: int | None = None,
) -> ExportOptions:
    """Resolves options, with INT2 for a model whose layers it holds exactly.

    Of other models it reads the first layer.

    Args:
        options: what the user chose.
        source: of the weights.
        architecture: of the model.
        spec: of the model.
        layers: to look at; None looks at all of them.

    Raises:
        DashError: a weight cannot be read, or the options do not suit the model.
    """
    facts, experts, width = spec.facts, spec.block.experts, spec.block.per_layer_width
    if experts is None:
        exact = replace(options, ternary=True).resolved(source.kind, facts, None, width)
        if _is_ternary(source, architecture, spec, exact, layers):
            return replace(exact, exact=True)
    usual = options.resolved(source.kind, facts, experts, width)
    if experts is not None or "int2" in usual.variants:
        return usual
    return replace(usual, exact=_stored(4, source, architecture, spec, usual, 1))


def _is_ternary(
    source: Source,
    architecture: Decoder,
    spec: ModelSpec,
    options: ExportOptions,
    layers: int | None,
) -> bool:
    names = architecture.names
    if spec.mixer_of(0) != "attention" and architecture.recurrent_names is not None:
        names = architecture.recurrent_names
    first = source.weights[f"{names.layers}.0.{names.output}.weight"]
    assert options.block_size is not None
    if ternary(first, 2, block_size_of(2, options.block_size, first.shape[1])) is None:
        return False
    return _stored(2, source, architecture, spec, options, layers)


def _stored(
    bits: Bits,
    source: Source,
    architecture: Decoder,
    spec: ModelSpec,
    options: ExportOptions,
    layers: int | None,
) -> bool:
    """Whether the first layers, or all, are stored in some bits as they are."""
    block = options.block_size
    assert block is not None
    return all(
        linear.stored(bits, block_size_of(bits, block, linear.in_features)) is not None
        for index in range(layers or spec.facts.num_layers)
        for linear in architecture.layer(source.weights, index, spec).linears
    )
