"""The export: from a model to a bundle, with one layer in memory at a time.

`pipeline` runs all steps in order; `options` are the user's choices; `graph_writer` writes the
graphs and measures each one as it goes; `partial` keeps what is finished, so that an export can be
interrupted anywhere. `check` compares a bundle with transformers, `sizes` estimates a bundle in
advance. Whatever determines the content of files belongs in the options, whose values a resumed
export compares.
"""

from dash_onnx.exporters.export.options import ExportOptions
from dash_onnx.exporters.export.pipeline import export

__all__ = ["ExportOptions", "export"]
