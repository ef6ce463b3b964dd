"""Where weights come from: a hub id, a local safetensors folder, or a GGUF file."""

from dash_onnx.exporters.sources.open import open_source
from dash_onnx.exporters.sources.source import Source, Weights

__all__ = ["Source", "Weights", "open_source"]
