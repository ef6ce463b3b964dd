"""The fused bundle: the policy as one ONNX graph, with an `If` per layer, for any ORT client.

The graphs of the bundle become its branches, with the same weights; only the skip graph writes
its K/V with GroupQueryAttention as the others do, so that clients may share past and present
buffers or not. Decoding decides per token; a prompt runs at one precision.
"""

from dash_onnx.exporters.fused.folder import fuse
from dash_onnx.exporters.fused.names import BUDGET, DATA, MODEL, PATH

__all__ = ["BUDGET", "DATA", "MODEL", "PATH", "fuse"]
