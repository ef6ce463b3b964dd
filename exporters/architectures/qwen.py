"""Qwen 2, 2.5 and 3: biases of queries, keys and values; from 3 on a norm of each head instead."""

from __future__ import annotations

from typing import ClassVar

from transformers import PretrainedConfig

from dash_onnx.core.block import Attention
from dash_onnx.exporters.architectures.decoder import Decoder, Names, sliding_where_listed


class Qwen2(Decoder):
    """`model_type: qwen2`."""

    def attention(self, config: PretrainedConfig, layer: int, length: int) -> Attention:
        """See `Decoder`."""
        return Attention(rope=0, window=sliding_where_listed(config, layer, length))


class Qwen3(Qwen2):
    """`model_type: qwen3`."""

    names: ClassVar[Names] = Names(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
