"""Names of the fused folder's files and of the graph's own ports."""

MODEL = "model.onnx"
DATA = "model.onnx.data"
BUDGET = "dash_budget"
"""Optional graph input, float `[1]`: fraction of the full time per token."""

PATH = "dash_path"
"""Graph output, int64 `[L]`: index of each layer's action in the bundle's list of actions."""
