"""Mistral: every layer sees a window of the last tokens, where the config has one."""

from __future__ import annotations

from transformers import PretrainedConfig

from dash_onnx.core.block import Attention
from dash_onnx.exporters.architectures.decoder import Decoder, sliding


class Mistral(Decoder):
    """`model_type: mistral`."""

    def attention(self, config: PretrainedConfig, layer: int, length: int) -> Attention:
        """See `Decoder`."""
        return Attention(rope=0, window=sliding(config, length))
