"""Llama 1-3 and everything that shares its layout (SmolLM2, TinyLlama, ...)."""

from __future__ import annotations

from dash_onnx.exporters.architectures.decoder import Decoder


class Llama(Decoder):
    """`model_type: llama`."""
