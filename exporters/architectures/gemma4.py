"""Gemma 4: layers that read K/V of earlier ones, and embeddings of the tokens for each layer."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dash_onnx.core.block import Attention, Block, Mixer
from dash_onnx.core.errors import UnsupportedError
from dash_onnx.core.facts import Rope
from dash_onnx.exporters.architectures.base import (
    Layer,
    Linear,
    ModelSpec,
    Norm,
    PerLayer,
    Scales,
    check_shape,
    take,
)
from dash_onnx.exporters.architectures.decoder import Decoder, linear_at
from dash_onnx.exporters.architectures.names import GEMMA3, Names
from dash_onnx.exporters.architectures.rope import LAYER_TYPES, rope_of
from dash_onnx.exporters.sources import Table, Weights

_TABLE = "model.embed_tokens_per_layer.weight"
_PROJECTION, _PROJECTION_NORM = (
    f"model.per_layer_{name}.weight" for name in ("model_projection", "projection_norm")
)
_SHARE = 2.0**-0.5  # weight of the table's row and of the projection in their sum


class Gemma4(Decoder):
    """Gemma 4's dense language models; layers with a window have heads of another size."""

    def _described(self, name: str, config: PretrainedConfig, max_length: int | None) -> ModelSpec:
        by_layer = tuple(config.per_layer_config)
        first = copy.copy(by_layer[0])  # the layers whose sizes count as the model's
        first.by_layer = by_layer
        return super()._described(name, first, max_length)

    def block(self, config: PretrainedConfig) -> Block:
        """See `Decoder`."""
        if config.use_bidirectional_attention == "all":
            raise UnsupportedError("use_bidirectional_attention is 'all': not a causal model")
        width = getattr(config, "hidden_size_per_layer_input", None) or 0
        if width and config.vocab_size_per_layer_input < config.vocab_size:
            raise UnsupportedError(
                f"vocab_size_per_layer_input {config.vocab_size_per_layer_input} is less than "
                f"vocab_size {config.vocab_size}"
            )
        return replace(super().block(config), attention_scale=1.0, per_layer_width=int(width))

    def scales(self, config: PretrainedConfig) -> Scales:
        """See `Decoder`."""
        return Scales(embedding=float(config.hidden_size**0.5))

    def mixers(self, config: PretrainedConfig) -> tuple[Mixer, ...]:
        """See `Decoder`."""
        modes = config.kv_sharing_modes
        return tuple("shared_attention" if mode == "reuse" else "attention" for mode in modes)

    def ropes(self, config: PretrainedConfig, length: int) -> tuple[Rope, ...]:
        """See `Decoder`; one per layer type. `proportional` pairs the halves of whole heads."""
        found = []
        for kind in (kind for kind in LAYER_TYPES if kind in config.layer_types):
            own = config.by_layer[config.layer_types.index(kind)]
            if own.rope_parameters[kind].get("rope_type") == "proportional":
                inv_freq, _ = ROPE_INIT_FUNCTIONS["proportional"](own, layer_type=kind)
                found.append(Rope(tuple(inv_freq.tolist()), 1.0))
            else:
                found.append(rope_of(own, length, kind))
        return tuple(found)

    def head_order(self, rope: Rope, head: int) -> None:
        """See `Decoder`: dimensions that are not rotated stay between those that are."""

    def attention(self, config: PretrainedConfig, layer: int, length: int) -> Attention:
        """See `Decoder`."""
        own, modes, source = config.by_layer[layer], config.kv_sharing_modes, None
        if modes[layer] == "reuse":
            kinds = [*zip(config.layer_types, modes, strict=True)]
            source = kinds.index((config.layer_types[layer], "store"))
        return replace(
            super().attention(config, layer, length),
            kv_heads=_other(own.num_key_value_heads, config.num_key_value_heads),
            head_dim=_other(own.head_dim, config.head_dim),
            source=source,
        )

    def inside(
        self, weights: Weights, names: Names, index: int, spec: ModelSpec
    ) -> tuple[Names, int]:
        """See `Decoder`."""
        query, key, value = names.qkv
        prefix = f"{names.layers}.{index}."
        inner = weights.shape(f"{prefix}{names.gate_up[0]}.weight")[0]  # use_double_wide_mlp
        if spec.mixer_of(index) == "shared_attention":  # files may hold K/V weights anyway
            return replace(names, qkv=(query,), k_norm=None), inner
        if f"{prefix}{value}.weight" not in weights:  # attention_k_eq_v
            value = key
        return replace(names, qkv=(query, key, value)), inner

    def layer(self, weights: Weights, index: int, spec: ModelSpec) -> Layer:
        """See `Decoder`."""
        layer, prefix = super().layer(weights, index, spec), f"{self.names.layers}.{index}."
        width, size = spec.facts.hidden_size, spec.block.per_layer_width
        if f"{prefix}layer_scalar" in weights:
            layer = replace(layer, factor=take(weights, f"{prefix}layer_scalar", 1))
        if spec.mixer_of(index) == "attention":
            layer = replace(layer, v_norm=Norm(torch.ones(spec.heads_of(index)[1])))
        if not size:
            return layer
        gate, output = f"{prefix}per_layer_input_gate", f"{prefix}per_layer_projection"
        return replace(
            layer,
            per_layer_gate=linear_at(weights, gate, "per_layer_gate", size, width),
            per_layer_output=linear_at(weights, output, "per_layer_output", width, size),
            per_layer_norm=self._norm(weights, f"{prefix}post_per_layer_input_norm", width),
        )

    def per_layer(self, weights: Weights, spec: ModelSpec) -> PerLayer | None:
        """See `Decoder`."""
        facts, size = spec.facts, spec.block.per_layer_width
        if not size:
            return None
        every = facts.num_layers * size
        table = Table(weights, _TABLE)
        check_shape(_TABLE, table.shape, (table.shape[0], every))
        projection = take(weights, _PROJECTION, every, facts.hidden_size)
        norm = Norm(take(weights, _PROJECTION_NORM, size)).scaled(_SHARE)
        scale = _SHARE * size**0.5
        return PerLayer(table, scale, Linear("per_layer_projection", projection), norm)


def _other(value: int, usual: int) -> int | None:
    return None if value == usual else int(value)


GEMMA4 = Gemma4(GEMMA3, windows="listed", refused=("enable_moe_block",))
