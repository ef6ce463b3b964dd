"""The sizes of the graph contract, from a model specification."""

from __future__ import annotations

from dash_onnx.core.contract import Dims
from dash_onnx.core.facts import Target
from dash_onnx.exporters.architectures.base import ModelSpec


def dims_of(spec: ModelSpec, target: Target) -> Dims:
    """What the ports of a model's graphs depend on."""
    return Dims(
        hidden_size=spec.facts.hidden_size,
        num_kv_heads=spec.facts.num_kv_heads,
        head_dim=spec.facts.head_dim,
        rotary_dim=2 * len(spec.ropes[0].inv_freq),
        vocab_size=spec.facts.vocab_size,
        dtype=target.dtype,
    )
