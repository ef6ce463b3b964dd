"""Llama 1-3 and everything that shares its layout (SmolLM2, TinyLlama, ...)."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dash_onnx.errors import ContextLengthError, UnsupportedError
from dash_onnx.exporters.architectures.base import Head, Layer, Linear, ModelSpec, stack
from dash_onnx.exporters.sources import Weights
from dash_onnx.manifest import ModelFacts, Rope

# `dynamic` and `longrope` change their frequencies with the length of the context.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class Llama:
    """`model_type: llama`."""

    def describe(self, name: str, config: PretrainedConfig, max_length: int | None) -> ModelSpec:
        """See `Architecture`."""
        if config.hidden_act != "silu":
            raise UnsupportedError(f"activation {config.hidden_act!r} is not supported; only silu")
        longest = int(config.max_position_embeddings)
        if max_length is not None and not 1 <= max_length <= longest:
            raise ContextLengthError(
                f"--max-length {max_length} is outside 1..{longest}, what the model was trained for"
            )
        return ModelSpec(
            facts=ModelFacts(
                name=name,
                architecture=config.model_type,
                num_layers=config.num_hidden_layers,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
                head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
                vocab_size=config.vocab_size,
                max_length=max_length or longest,
            ),
            rope=_rope(config),
            norm_epsilon=float(config.rms_norm_eps),
        )

    def embedding(self, weights: Weights) -> torch.Tensor:
        """See `Architecture`."""
        return weights["model.embed_tokens.weight"]

    def layer(self, weights: Weights, index: int, spec: ModelSpec) -> Layer:
        """See `Architecture`."""
        prefix = f"model.layers.{index}."

        def linear(name: str) -> Linear:
            bias = f"{prefix}{name}.bias"
            return Linear(
                name.rpartition(".")[2],
                weights[f"{prefix}{name}.weight"],
                weights[bias] if bias in weights else None,
            )

        return Layer(
            input_norm=weights[f"{prefix}input_layernorm.weight"],
            qkv=stack("qkv_proj", *(linear(f"self_attn.{n}_proj") for n in "qkv")),
            output=linear("self_attn.o_proj"),
            post_norm=weights[f"{prefix}post_attention_layernorm.weight"],
            gate_up=stack("gate_up_proj", linear("mlp.gate_proj"), linear("mlp.up_proj")),
            down=linear("mlp.down_proj"),
        )

    def head(self, weights: Weights, config: PretrainedConfig) -> Head:
        """See `Architecture`."""
        tied = config.tie_word_embeddings or "lm_head.weight" not in weights
        weight = self.embedding(weights) if tied else weights["lm_head.weight"]
        return Head(norm=weights["model.norm.weight"], linear=Linear("lm_head", weight))


def _rope(config: PretrainedConfig) -> Rope:
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise UnsupportedError(
            f"RoPE type {kind!r} is not supported; supported: {', '.join(_ROPE_TYPES)}"
        )
    embedding = LlamaRotaryEmbedding(config)
    return Rope(
        inv_freq=tuple(embedding.inv_freq.float().tolist()),
        attention_scaling=float(embedding.attention_scaling),
    )
