"""Phi 3, 3.5 and 4 (mini): stacked projections, windows, some with part of a head rotated."""

from __future__ import annotations

from typing import ClassVar

from transformers import PretrainedConfig

from dash_onnx.core.block import Attention
from dash_onnx.exporters.architectures.decoder import Decoder, Names, sliding


class Phi3(Decoder):
    """`model_type: phi3`."""

    names: ClassVar[Names] = Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))

    def attention(self, config: PretrainedConfig, layer: int, length: int) -> Attention:
        """See `Decoder`."""
        return Attention(rope=0, window=sliding(config, length))
