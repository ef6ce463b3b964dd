"""The model families: what each of them has otherwise than Llama, by its `model_type`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from transformers import PretrainedConfig

from dash_onnx.core.block import Attention, Block
from dash_onnx.core.errors import UnsupportedError
from dash_onnx.core.facts import Rope
from dash_onnx.exporters.architectures.base import Linear, ModelSpec, Scales
from dash_onnx.exporters.architectures.decoder import Decoder, Names
from dash_onnx.exporters.architectures.rope import rope_of
from dash_onnx.exporters.sources.source import check_supported

_ROPES = ("full_attention", "sliding_attention")  # Gemma 3's, in the order of the bundle


class Gemma2(Decoder):
    """Norms on both sides of attention and MLP, windows in most layers, softcaps."""

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

    def scales(self, config: PretrainedConfig) -> Scales:
        """See `Decoder`."""
        return Scales(embedding=float(config.hidden_size**0.5))


class Gemma3(Gemma2):
    """As Gemma 2; local and global layers rotate at different frequencies."""

    def ropes(self, config: PretrainedConfig, length: int) -> tuple[Rope, ...]:
        """See `Decoder`."""
        return tuple(rope_of(config, length, kind) for kind in _ROPES)

    def attention(self, config: PretrainedConfig, layer: int, length: int) -> Attention:
        """See `Decoder`."""
        window = self.window(config, layer, length)
        return Attention(_ROPES.index(config.layer_types[layer]), window)


class GPTNeoX(Decoder):
    """GPT-NeoX and Pythia: LayerNorm, attention beside an MLP without gate, biases everywhere."""

    def block(self, config: PretrainedConfig) -> Block:
        """See `Decoder`."""
        parallel = bool(config.use_parallel_residual)
        return replace(super().block(config), norm="layer", gated=False, parallel=parallel)

    def qkv(self, stacked: Linear, spec: ModelSpec) -> Linear:
        """See `Decoder`; the model stores query, key and value head by head."""
        heads, size = spec.facts.num_heads, spec.facts.head_dim
        order = np.arange(stacked.out_features).reshape(heads, 3, size)
        return stacked.reordered(order.swapaxes(0, 1).reshape(-1))


class Granite(Decoder):
    """Granite 3 (dense): Llama with multipliers, none of which costs anything.

    Layers add m times their result to the residual stream. The graphs keep the stream divided by
    m: then layers add their result as it is, and norms, which take any factor out, only need their
    epsilon divided by m^2.
    """

    def block(self, config: PretrainedConfig) -> Block:
        """See `Decoder`."""
        block = super().block(config)
        return replace(
            block,
            attention_scale=float(config.attention_multiplier),
            norm_epsilon=block.norm_epsilon / config.residual_multiplier**2,
        )

    def scales(self, config: PretrainedConfig) -> Scales:
        """See `Decoder`."""
        stream = float(config.residual_multiplier)
        return Scales(config.embedding_multiplier / stream, stream, 1.0 / config.logits_scaling)


class SmolLM3(Decoder):
    """SmolLM 3: every fourth layer rotates nothing."""

    def attention(self, config: PretrainedConfig, layer: int, length: int) -> Attention:
        """See `Decoder`."""
        window = self.window(config, layer, length) if config.use_sliding_window else None
        return Attention(rope=0 if config.no_rope_layers[layer] else None, window=window)


class StableLM(Decoder):
    """LayerNorm, a quarter of each head rotated, in some MLP and attention side by side."""

    def block(self, config: PretrainedConfig) -> Block:
        """See `Decoder`."""
        if config.qk_layernorm:
            raise UnsupportedError("qk_layernorm (StableLM 2 12B) is not supported")
        parallel = bool(config.use_parallel_residual)
        return replace(super().block(config), norm="layer", parallel=parallel)


_GEMMA = Names(
    output_norm="post_attention_layernorm",
    post_norm="pre_feedforward_layernorm",
    down_norm="post_feedforward_layernorm",
)
_HEAD_NORMS = Names(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")

REGISTRY: dict[str, Decoder] = {
    "gemma2": Gemma2(_GEMMA, windows="listed", norm_offset=1.0),
    "gemma3_text": Gemma3(
        replace(_GEMMA, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
        windows="listed",
        norm_offset=1.0,
    ),
    "gpt_neox": GPTNeoX(
        Names(
            embedding="gpt_neox.embed_in",
            layers="gpt_neox.layers",
            final_norm="gpt_neox.final_layer_norm",
            qkv=("attention.query_key_value",),
            output="attention.dense",
            gate_up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
        )
    ),
    "granite": Granite(),
    "llama": Decoder(),
    "mistral": Decoder(windows="all"),
    "olmo2": Decoder(
        replace(
            _HEAD_NORMS,
            input_norm=None,
            output_norm="post_attention_layernorm",
            post_norm=None,
            down_norm="post_feedforward_layernorm",
        ),
        heads_together=True,
    ),
    "phi3": Decoder(
        Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)), windows="all"
    ),
    "qwen2": Decoder(windows="listed"),
    "qwen3": Decoder(_HEAD_NORMS, windows="listed"),
    "smollm3": SmolLM3(windows="listed"),
    "stablelm": StableLM(),
}
"""What each family has otherwise than Llama."""


def architecture_of(config: PretrainedConfig) -> Decoder:
    """The family of a model.

    Raises:
        UnsupportedError: none of ours.
    """
    check_supported(config.model_type, REGISTRY)
    return REGISTRY[config.model_type]
