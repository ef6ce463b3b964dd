"""Granite 3 (dense): Llama with multipliers, none of which costs anything.

Layers add m times their result to the residual stream. The graphs keep the stream divided by m:
then layers add their result as it is, and norms, which take any factor out, only need their
epsilon divided by m^2.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from dash_onnx.core.block import Block
from dash_onnx.exporters.architectures.decoder import Decoder


class Granite(Decoder):
    """`model_type: granite`."""

    def block(self, config: PretrainedConfig) -> Block:
        """See `Decoder`."""
        block = super().block(config)
        return replace(
            block,
            attention_scale=float(config.attention_multiplier),
            norm_epsilon=block.norm_epsilon / config.residual_multiplier**2,
        )

    def embedding_scale(self, config: PretrainedConfig) -> float:
        """See `Decoder`."""
        return float(config.embedding_multiplier / config.residual_multiplier)

    def stream_scale(self, config: PretrainedConfig) -> float:
        """See `Decoder`."""
        return float(config.residual_multiplier)

    def logit_scale(self, config: PretrainedConfig) -> float:
        """See `Decoder`."""
        return float(1.0 / config.logits_scaling)
