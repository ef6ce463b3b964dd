"""The fused bundle: the policy as one ONNX graph, with an `If` per layer, for any ORT client.

The graphs of the bundle become its branches, with the same weights. The skip graph is changed to
write its K/V with GroupQueryAttention like the others, so that clients may share past and present
buffers or not. Decoding decides per token; a prompt runs at one precision.
"""

from dash_onnx.exporters.fused.clients import CLIENTS
from dash_onnx.exporters.fused.facts import BUDGET, DATA, FACTS, MODEL, PATH, FuseOptions, adapter
from dash_onnx.exporters.fused.folder import check_fusable, fuse, options_of

__all__ = [
    "BUDGET",
    "CLIENTS",
    "DATA",
    "FACTS",
    "MODEL",
    "PATH",
    "FuseOptions",
    "adapter",
    "check_fusable",
    "fuse",
    "options_of",
]
