"""Model families: which weights a layer has, and what it computes with them.

`base` describes a layer so that graphs can be built without knowing its family; `decoder` maps the
config and the weights of Llama to that; `families` says how the others differ. A new family is an
entry in its registry, plus a subclass of `Decoder` where different names are not enough.
"""

from dash_onnx.exporters.architectures.families import REGISTRY, architecture_of

__all__ = ["REGISTRY", "architecture_of"]
