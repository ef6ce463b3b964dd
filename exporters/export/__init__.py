"""The export: a model in, a bundle out, one layer in memory at a time.

`pipeline` is the whole in order; `options` are what the user chooses; `graph_writer` writes the
graphs and measures each on the way; `partial` keeps what is finished, so that an export can be
interrupted anywhere. `check` compares a bundle with transformers, `sizes` foretells one. Whatever
decides the content of files belongs into the options, whose values a resumed export compares.
"""

from dash_onnx.exporters.export.options import ExportOptions
from dash_onnx.exporters.export.pipeline import export

__all__ = ["ExportOptions", "export"]
