"""The ONNX graphs of a bundle, built with onnxscript on ORT's fused operators.

`graph` is shared by all: ports of the contract, stored weights, linear layers, norms. `layer`,
`skip` and `ends` each build one kind of graph from a description of `architectures`. Training and
fused graphs read the stored weights by name and layout: change both together.
"""

from dash_onnx.exporters.graphs.attention import ATTENTION, KVQuantization
from dash_onnx.exporters.graphs.ends import build_embed, build_head, rescores
from dash_onnx.exporters.graphs.layer import HIDDEN, build_layer, captured_inputs
from dash_onnx.exporters.graphs.skip import build_skip, kept_rows, replace_expand

__all__ = [
    "ATTENTION",
    "HIDDEN",
    "KVQuantization",
    "build_embed",
    "build_head",
    "build_layer",
    "build_skip",
    "captured_inputs",
    "kept_rows",
    "replace_expand",
    "rescores",
]
