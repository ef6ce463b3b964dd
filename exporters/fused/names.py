"""Names of the fused folder's files and of the graph's own ports."""

MODEL = "model.onnx"
DATA = "model.onnx.data"
FACTS = "dash_fused.json"
BUDGET = "dash_budget"
"""Graph input, float `[1]`: fraction of the full time per token."""

PATH = "dash_path"
"""Graph output, int64 `[L]`: index of each layer's action in the actions of `dash_fused.json`."""


def adapter(preset: str) -> str:
    """File of the adapter that sets a preset's budget."""
    return f"{preset}.onnx_adapter"
