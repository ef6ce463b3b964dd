"""The ONNX graphs of a bundle, built with onnxscript on ORT's fused operators.

`graph` is the common ground: ports of the contract, stored weights, linear layers, norms. `layer`,
`skip` and `ends` build one kind each from a description of `architectures`. Names and bytes of the
stored weights are read elsewhere (training, fused graphs): who renames one looks there.
"""

from dash_onnx.exporters.graphs.attention import ATTENTION, KVScales
from dash_onnx.exporters.graphs.ends import build_embed, build_head, looks_twice
from dash_onnx.exporters.graphs.layer import HIDDEN, build_layer, captured_inputs
from dash_onnx.exporters.graphs.skip import build_skip, kept_rows, replace_expand

__all__ = [
    "ATTENTION",
    "HIDDEN",
    "KVScales",
    "build_embed",
    "build_head",
    "build_layer",
    "build_skip",
    "captured_inputs",
    "kept_rows",
    "looks_twice",
    "replace_expand",
]
