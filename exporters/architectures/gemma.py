"""Gemma 2 and 3 (text): norms on both sides of attention and MLP, windows in most layers."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from transformers import PretrainedConfig

from dash_onnx.core.block import Attention, Block
from dash_onnx.core.errors import UnsupportedError
from dash_onnx.core.facts import Rope
from dash_onnx.exporters.architectures.decoder import Decoder, Names, sliding_where_listed
from dash_onnx.exporters.architectures.rope import rope_of


class Gemma2(Decoder):
    """`model_type: gemma2`."""

    names: ClassVar[Names] = Names(
        output_norm="post_attention_layernorm",
        post_norm="pre_feedforward_layernorm",
        down_norm="post_feedforward_layernorm",
    )
    norm_offset: ClassVar[float] = 1.0

    def block(self, config: PretrainedConfig) -> Block:
        """See `Decoder`."""
        if getattr(config, "use_bidirectional_attention", None):
            raise UnsupportedError("use_bidirectional_attention is set: not a causal model")
        return replace(
            super().block(config),
            attention_scale=config.query_pre_attn_scalar**-0.5,
            attention_softcap=config.attn_logit_softcapping,
            logit_softcap=config.final_logit_softcapping,
        )

    def attention(self, config: PretrainedConfig, layer: int, length: int) -> Attention:
        """See `Decoder`."""
        return Attention(rope=0, window=sliding_where_listed(config, layer, length))

    def embedding_scale(self, config: PretrainedConfig) -> float:
        """See `Decoder`."""
        return float(config.hidden_size**0.5)


_ROPES = ("full_attention", "sliding_attention")


class Gemma3(Gemma2):
    """`model_type: gemma3_text`: local and global layers rotate at different frequencies."""

    names: ClassVar[Names] = replace(
        Gemma2.names, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"
    )

    def ropes(self, config: PretrainedConfig, length: int) -> tuple[Rope, ...]:
        """See `Decoder`."""
        return tuple(rope_of(config, length, kind) for kind in _ROPES)

    def attention(self, config: PretrainedConfig, layer: int, length: int) -> Attention:
        """See `Decoder`."""
        window = sliding_where_listed(config, layer, length)
        return Attention(rope=_ROPES.index(config.layer_types[layer]), window=window)
