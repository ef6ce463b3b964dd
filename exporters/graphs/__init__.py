"""ONNX graphs of a bundle, built with onnxscript on ORT's fused operators."""

from dash_onnx.exporters.graphs.ends import build_embed, build_head
from dash_onnx.exporters.graphs.layer import HIDDEN, build_layer, taps_of
from dash_onnx.exporters.graphs.skip import build_skip, replace_expand

__all__ = [
    "HIDDEN",
    "build_embed",
    "build_head",
    "build_layer",
    "build_skip",
    "replace_expand",
    "taps_of",
]
