"""SmolLM 3: every fourth layer rotates nothing."""

from __future__ import annotations

from transformers import PretrainedConfig

from dash_onnx.core.block import Attention
from dash_onnx.exporters.architectures.decoder import Decoder, sliding_where_listed


class SmolLM3(Decoder):
    """`model_type: smollm3`."""

    def attention(self, config: PretrainedConfig, layer: int, length: int) -> Attention:
        """See `Decoder`."""
        window = sliding_where_listed(config, layer, length) if config.use_sliding_window else None
        return Attention(rope=0 if config.no_rope_layers[layer] else None, window=window)
