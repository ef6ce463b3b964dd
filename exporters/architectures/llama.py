"""Llama 1-3 and everything that shares its layout (SmolLM2, TinyLlama, ...)."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dash_onnx.errors import ContextLengthError, UnsupportedError
from dash_onnx.exporters.architectures.base import Head, Layer, Linear, ModelSpec, stack, take
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

    def embedding(self, weights: Weights, spec: ModelSpec) -> torch.Tensor:
        """See `Architecture`."""
        facts = spec.facts
        return take(weights, "model.embed_tokens.weight", facts.vocab_size, facts.hidden_size)

    def layer(self, weights: Weights, index: int, spec: ModelSpec) -> Layer:
        """See `Architecture`."""
        prefix = f"model.layers.{index}."
        facts = spec.facts
        width, inner = facts.hidden_size, facts.intermediate_size
        queries, keys = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim

        def linear(name: str, rows: int, columns: int) -> Linear:
            weight, bias = f"{prefix}{name}.weight", f"{prefix}{name}.bias"
            return Linear(
                name.rpartition(".")[2],
                take(weights, weight, rows, columns),
                take(weights, bias, rows) if bias in weights else None,
                weights.packed(weight),
            )

        return Layer(
            input_norm=take(weights, f"{prefix}input_layernorm.weight", width),
            qkv=stack(
                "qkv_proj",
                linear("self_attn.q_proj", queries, width),
                linear("self_attn.k_proj", keys, width),
                linear("self_attn.v_proj", keys, width),
            ),
            output=linear("self_attn.o_proj", width, queries),
            post_norm=take(weights, f"{prefix}post_attention_layernorm.weight", width),
            gate_up=stack(
                "gate_up_proj",
                linear("mlp.gate_proj", inner, width),
                linear("mlp.up_proj", inner, width),
            ),
            down=linear("mlp.down_proj", width, inner),
        )

    def head(self, weights: Weights, spec: ModelSpec, config: PretrainedConfig) -> Head:
        """See `Architecture`."""
        facts = spec.facts
        if config.tie_word_embeddings or "lm_head.weight" not in weights:
            weight = self.embedding(weights, spec)
        else:
            weight = take(weights, "lm_head.weight", facts.vocab_size, facts.hidden_size)
        norm = take(weights, "model.norm.weight", facts.hidden_size)
        return Head(norm=norm, linear=Linear("lm_head", weight))


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
