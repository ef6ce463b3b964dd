"""Options that suit a model's weights: whether they are ternary, or quantized already."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from dash_onnx.exporters.architectures.base import Layer, ModelSpec
from dash_onnx.exporters.architectures.decoder import Decoder
from dash_onnx.exporters.export.options import ExportOptions
from dash_onnx.exporters.graphs.graph import block_size_of
from dash_onnx.exporters.quantize.blockwise import Bits
from dash_onnx.exporters.sources import Source


def suited(
    options: ExportOptions,
    source: Source,
    architecture: Decoder,
    spec: ModelSpec,
    layers: int | None = None,
) -> ExportOptions:
    """Resolves options, with INT2 for a model whose layers it holds exactly.

    For other models only the first layer is read.

    Args:
        options: the user's options.
        source: source of the weights.
        architecture: family of the model.
        spec: description of the model.
        layers: number of layers to inspect; None inspects all of them.

    Raises:
        DashError: a weight cannot be read, or the options do not suit the model.
    """
    if not source.integers:  # none to keep
        options = replace(options, requantize=True)
    if spec.block.experts is not None:
        return options.resolved(source.kind, spec)
    exact = replace(options, ternary=True).resolved(source.kind, spec)
    first = architecture.layer(source.weights, 0, spec)
    others = (
        architecture.layer(source.weights, index, spec)
        for index in range(1, layers or spec.facts.num_layers)
    )
    if all(_stored(layer, 2, exact) for layer in chain([first], others)):
        return replace(exact, exact=True)
    usual = options.resolved(source.kind, spec)
    return replace(usual, exact="int2" not in usual.variants and _stored(first, 4, usual))


def _stored(layer: Layer, bits: Bits, options: ExportOptions) -> bool:
    """Whether a bit width stores a layer without rounding."""
    block = options.block_size
    assert block is not None
    return all(
        linear.stored(bits, block_size_of(bits, block, linear.in_features)) is not None
        for linear in layer.linears
    )
