"""Where weights come from: a hub id, a local safetensors folder, or a GGUF file.

`open` decides which and `source` is what all of them give: a config, a tokenizer, and weights by
their Hugging Face names. Nothing of a model is executed, and no weight is read before it is asked
for: both must stay so. What `gguf_*` states are facts of llama.cpp.
"""

from dash_onnx.exporters.sources.open import open_source
from dash_onnx.exporters.sources.source import Shapes, Source, Table, Weights, readable

__all__ = ["Shapes", "Source", "Table", "Weights", "open_source", "readable"]
