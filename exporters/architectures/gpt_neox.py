"""GPT-NeoX and Pythia: LayerNorm, attention beside an MLP without gate, biases everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
from transformers import PretrainedConfig

from dash_onnx.core.block import Block
from dash_onnx.exporters.architectures.base import Linear, ModelSpec
from dash_onnx.exporters.architectures.decoder import Decoder, Names


class GPTNeoX(Decoder):
    """`model_type: gpt_neox`."""

    names: ClassVar[Names] = Names(
        embedding="gpt_neox.embed_in",
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        qkv=("attention.query_key_value",),
        output="attention.dense",
        gate_up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
    )

    def block(self, config: PretrainedConfig) -> Block:
        """See `Decoder`."""
        parallel = bool(config.use_parallel_residual)
        return replace(super().block(config), norm="layer", gated=False, parallel=parallel)

    def qkv(self, stacked: Linear, spec: ModelSpec) -> Linear:
        """See `Decoder`; the model stores query, key and value head by head."""
        heads, size = spec.facts.num_heads, spec.facts.head_dim
        order = np.arange(stacked.out_features).reshape(heads, 3, size)
        return stacked.reordered(order.swapaxes(0, 1).reshape(-1))
