"""Where weights come from: a hub id, a local safetensors folder, or a GGUF file.

`open` decides which one it is, and `source` defines what all of them provide: a config, a
tokenizer, and weights by their Hugging Face names. Nothing in a model is executed, and no weight is
read before it is requested: both must stay so. The facts in `gguf_*` come from llama.cpp.
"""

from dash_onnx.exporters.sources.open import open_source
from dash_onnx.exporters.sources.source import Shapes, Source, Table, Weights, Wrapped, readable

__all__ = ["Shapes", "Source", "Table", "Weights", "Wrapped", "open_source", "readable"]
