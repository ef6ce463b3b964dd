"""StableLM: LayerNorm, a quarter of each head rotated, in some MLP and attention side by side."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from dash_onnx.core.block import Block
from dash_onnx.core.errors import UnsupportedError
from dash_onnx.exporters.architectures.decoder import Decoder


class StableLM(Decoder):
    """`model_type: stablelm`."""

    def block(self, config: PretrainedConfig) -> Block:
        """See `Decoder`."""
        if config.qk_layernorm:
            raise UnsupportedError("qk_layernorm (StableLM 2 12B) is not supported")
        parallel = bool(config.use_parallel_residual)
        return replace(super().block(config), norm="layer", parallel=parallel)
