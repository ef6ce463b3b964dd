"""Families in which some layers keep a state of fixed size instead of K/V."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from transformers import PretrainedConfig

from dash_onnx.core.block import Block, Mixer, Recurrence
from dash_onnx.core.errors import UnsupportedError
from dash_onnx.exporters.architectures.base import (
    Conv,
    Delta,
    Layer,
    Linear,
    ModelSpec,
    Norm,
    stack,
    take,
)
from dash_onnx.exporters.architectures.decoder import Decoder, declared
from dash_onnx.exporters.architectures.names import HEAD_NORMS, Names
from dash_onnx.exporters.sources import Weights


@dataclass(frozen=True)
class Hybrid(Decoder):
    """Decoders with attention in some layers only.

    Attributes:
        conv: name of the convolution of a layer without attention.
    """

    conv: str = ""

    def layer(self, weights: Weights, index: int, spec: ModelSpec) -> Layer:
        """See `Decoder`."""
        layer, prefix = super().layer(weights, index, spec), f"{self.names.layers}.{index}."
        if spec.mixer_of(index) == "attention":
            return layer
        return replace(
            layer,
            qkv=self.recurrent_input(layer.qkv, spec),
            conv=self._conv(weights, prefix + self.conv, spec.recurrence),
            delta=self.delta(weights, prefix, spec),
        )

    def recurrent_input(self, stacked: Linear, spec: ModelSpec) -> Linear:
        """Reorders the rows of the input projection for the graphs, see `Layer`."""
        return stacked

    def delta(self, weights: Weights, prefix: str, spec: ModelSpec) -> Delta | None:
        """The weights specific to a Gated DeltaNet."""
        return None

    def _conv(self, weights: Weights, name: str, sizes: Recurrence | None) -> Conv:
        assert sizes is not None
        weight, bias = take(weights, f"{name}.weight", sizes.channels, 1, sizes.kernel), None
        if f"{name}.bias" in weights:
            bias = take(weights, f"{name}.bias", sizes.channels)
        return Conv(weight[:, 0], bias)


class Lfm2(Hybrid):
    """LFM 2: short convolutions in place of attention in most layers."""

    def mixers(self, config: PretrainedConfig) -> tuple[Mixer, ...]:
        """See `Decoder`."""
        return _mixers_of(config, {"full_attention": "attention", "conv": "short_conv"})

    def recurrence(self, config: PretrainedConfig) -> Recurrence:
        """See `Decoder`."""
        return Recurrence(int(config.conv_L_cache), config.hidden_size)

    def inner_size(self, config: PretrainedConfig) -> int:
        """See `Decoder`; computed as in transformers."""
        size = int(config.intermediate_size)
        if declared(config, "block_auto_adjust_ff_dim"):  # that with experts does not
            size = int(2 * size / 3)
            if config.block_ffn_dim_multiplier is not None:
                size, step = int(config.block_ffn_dim_multiplier * size), config.block_multiple_of
                size = step * -(-size // step)
        return size

    def recurrent_input(self, stacked: Linear, spec: ModelSpec) -> Linear:
        """See `Hybrid`: the factor on the convolution's result comes last."""
        before, behind, x = np.arange(stacked.out_features).reshape(3, -1)
        return stacked.reordered(np.concatenate([before, x, behind]))


class Qwen35(Hybrid):
    """Qwen 3.5: Gated DeltaNet in three of four layers, gated attention in the others."""

    def mixers(self, config: PretrainedConfig) -> tuple[Mixer, ...]:
        """See `Decoder`."""
        kinds: dict[str, Mixer] = {"full_attention": "attention", "linear_attention": "gated_delta"}
        return _mixers_of(config, kinds)

    def recurrence(self, config: PretrainedConfig) -> Recurrence:
        """See `Decoder`."""
        keys, values = config.linear_num_key_heads, config.linear_num_value_heads
        key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        channels = 2 * keys * key_dim + values * value_dim
        kernel = int(config.linear_conv_kernel_dim)
        return Recurrence(kernel, channels, keys, values, key_dim, value_dim)

    def block(self, config: PretrainedConfig) -> Block:
        """See `Decoder`."""
        if config.hidden_act != "silu":
            raise UnsupportedError(f"{config.model_type} with hidden_act {config.hidden_act!r}")
        return replace(super().block(config), heads_gated=True)

    def qkv(self, stacked: Linear, spec: ModelSpec) -> Linear:
        """See `Decoder`: stored with each head's gate after its query; here all gates come last."""
        heads, size = spec.facts.num_heads, spec.facts.head_dim
        rows = np.arange(stacked.out_features)
        queries, gates = rows[: 2 * heads * size].reshape(heads, 2, size).swapaxes(0, 1)
        order = [queries.reshape(-1), rows[2 * heads * size :], gates.reshape(-1)]
        return stacked.reordered(np.concatenate(order))

    def delta(self, weights: Weights, prefix: str, spec: ModelSpec) -> Delta:
        """See `Hybrid`."""
        sizes = spec.recurrence
        assert sizes is not None
        heads, prefix = sizes.value_heads, f"{prefix}linear_attn."
        return Delta(
            gates=self.gates(weights, prefix, heads, spec),
            decay=-take(weights, f"{prefix}A_log", heads).float().exp(),
            decay_bias=take(weights, f"{prefix}dt_bias", heads),
            norm=Norm(take(weights, f"{prefix}norm.weight", sizes.value_dim)),
        )

    def gates(self, weights: Weights, prefix: str, heads: int, spec: ModelSpec) -> Linear:
        """The projections of decay and update rate of all value heads, stacked."""
        width = spec.facts.hidden_size
        gates = (
            Linear(name, take(weights, f"{prefix}in_proj_{name}.weight", heads, width))
            for name in ("a", "b")
        )
        return stack("gates", *gates)


def _mixers_of(config: PretrainedConfig, kinds: Mapping[str, Mixer]) -> tuple[Mixer, ...]:
    for layer, kind in enumerate(config.layer_types):
        if kind not in kinds:
            known = ", ".join(kinds)
            raise UnsupportedError(f"layer {layer} is of type {kind!r}; supported: {known}")
    return tuple(kinds[kind] for kind in config.layer_types)


_LFM2 = Names(
    final_norm="model.embedding_norm",
    input_norm="operator_norm",
    q_norm="self_attn.q_layernorm",
    k_norm="self_attn.k_layernorm",
    output="self_attn.out_proj",
    post_norm="ffn_norm",
    gate_up=("feed_forward.w1", "feed_forward.w3"),
    down="feed_forward.w2",
)

LFM2 = Lfm2(
    _LFM2,
    recurrent_names=replace(
        _LFM2, qkv=("conv.in_proj",), q_norm=None, k_norm=None, output="conv.out_proj"
    ),
    conv="conv.conv",
)
QWEN35 = Qwen35(
    HEAD_NORMS,
    recurrent_names=Names(
        qkv=("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), output="linear_attn.out_proj"
    ),
    norm_offset=1.0,
    conv="linear_attn.conv1d",
)
