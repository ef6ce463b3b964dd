"""OLMo 2: norms behind attention and MLP instead of before, and of all queries and keys."""

from __future__ import annotations

from typing import ClassVar

from dash_onnx.exporters.architectures.decoder import Decoder, Names


class Olmo2(Decoder):
    """`model_type: olmo2`."""

    names: ClassVar[Names] = Names(
        input_norm=None,
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
        output_norm="post_attention_layernorm",
        post_norm=None,
        down_norm="post_feedforward_layernorm",
    )
    heads_together: ClassVar[bool] = True
