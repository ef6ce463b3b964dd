"""The model families: how each differs from Llama, by its `model_type`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from dash_onnx.core.block import Attention, Block, QueryScale
from dash_onnx.core.errors import UnsupportedError
from dash_onnx.core.facts import Rope
from dash_onnx.exporters.architectures.base import Linear, ModelSpec, Scales
from dash_onnx.exporters.architectures.decoder import Decoder
from dash_onnx.exporters.architectures.gemma4 import GEMMA4
from dash_onnx.exporters.architectures.hybrid import LFM2, QWEN35
from dash_onnx.exporters.architectures.names import (
    GEMMA,
    GEMMA3,
    HEAD_NORMS,
    HUNYUAN,
    NORMS_BEHIND,
    Names,
)
from dash_onnx.exporters.architectures.rope import rope_of
from dash_onnx.exporters.architectures.sparse import SPARSE, Sparse
from dash_onnx.exporters.sources.source import check_supported


class Gemma(Decoder):
    """Gemma: norm weights are stored minus 1, and embeddings are multiplied."""

    def block(self, config: PretrainedConfig) -> Block:
        """See `Decoder`."""
        if getattr(config, "use_bidirectional_attention", None):
            raise UnsupportedError("use_bidirectional_attention is set: not a causal model")
        block = super().block(config)
        scalar = getattr(config, "query_pre_attn_scalar", None)
        return block if scalar is None else replace(block, attention_scale=scalar**-0.5)

    def scales(self, config: PretrainedConfig) -> Scales:
        """See `Decoder`."""
        return Scales(embedding=float(config.hidden_size**0.5))


class HeadByHead(Decoder):
    """Decoders that store query, key and value stacked, head by head."""

    def qkv(self, stacked: Linear, spec: ModelSpec) -> Linear:
        """See `Decoder`."""
        heads, size = spec.facts.num_heads, spec.facts.head_dim
        order = np.arange(stacked.out_features).reshape(heads, 3, size)
        return stacked.reordered(order.swapaxes(0, 1).reshape(-1))


class Granite(Decoder):
    """Granite 3 and 4 (dense): Llama with multipliers, none of which adds any cost.

    Layers add m times their result to the residual stream. The graphs keep the stream divided by
    m: then layers add their result as it is, and norms, which are invariant to scale, only need
    their epsilon divided by m^2.
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
        embedding, logit = config.embedding_multiplier / stream, 1.0 / config.logits_scaling
        return Scales(embedding=embedding, stream=stream, logit=logit)


class GraniteHybrid(Granite):
    """Granite 4 with attention in all layers: the small models, some without a rotary embedding."""

    def attention(self, config: PretrainedConfig, layer: int, length: int) -> Attention:
        """See `Decoder`."""
        rope = 0 if config.position_embedding_type == "rope" else None
        return Attention(rope=rope, window=self.window(config, layer, length))

    def layer_type(self, config: PretrainedConfig, layer: int) -> str:
        """See `Decoder`; transformers has another name for what the files call `mamba`."""
        if config.layer_types[layer] == "linear_attention":
            raise UnsupportedError(
                f"layer {layer} is Mamba 2; of {config.model_type} only models with attention "
                "in every layer are supported"
            )
        return super().layer_type(config, layer)


class GraniteMoe(Sparse, Granite):
    """Granite 3 with experts."""


class GraniteSWA(Granite):
    """Granite with windows and sinks; each layer may have a rotary embedding of its own."""

    def ropes(self, config: PretrainedConfig, length: int) -> tuple[Rope, ...]:
        """See `Decoder`; at least one, even if no layer rotates anything."""
        bases = self._bases(config) or [config.rope_parameters["rope_theta"]]
        return tuple(rope_of(config, length, base=base) for base in bases)

    def attention(self, config: PretrainedConfig, layer: int, length: int) -> Attention:
        """See `Decoder`."""
        base = config.layer_rope_theta[layer]
        rope = self._bases(config).index(base) if base else None
        return Attention(rope=rope, window=self.window(config, layer, length))

    def _bases(self, config: PretrainedConfig) -> list[float]:
        return sorted({base for base in config.layer_rope_theta if base})


class GraniteMoeSWA(Sparse, GraniteSWA):
    """Granite with windows, sinks and experts."""


class HyperCLOVAX(Decoder):
    """HyperCLOVA X: Granite's multipliers; the residual one is folded into the output norms."""

    def block(self, config: PretrainedConfig) -> Block:
        """See `Decoder`."""
        scale = float(config.attention_multiplier)
        return replace(super().block(config), attention_scale=scale)

    def scales(self, config: PretrainedConfig) -> Scales:
        """See `Decoder`."""
        return Scales(
            embedding=float(config.embedding_multiplier),
            residual=float(config.residual_multiplier),
            logit=float(config.logits_scaling),
        )


class Cohere(Decoder):
    """Command R: a factor on the logits."""

    def scales(self, config: PretrainedConfig) -> Scales:
        """See `Decoder`."""
        return Scales(logit=float(config.logit_scale))


class Ministral3(Decoder):
    """Ministral 3: queries are scaled up with their position."""

    def query_scale(self, config: PretrainedConfig, length: int) -> QueryScale | None:
        """See `Decoder`."""
        beta = config.rope_parameters["llama_4_scaling_beta"]
        first = int(config.rope_parameters["original_max_position_embeddings"])
        return QueryScale(float(beta), first) if beta and length > first else None


class NanoChat(Decoder):
    """nanochat: norms of queries and keys have no weights, so they may come before the rotation."""

    def ropes(self, config: PretrainedConfig, length: int) -> tuple[Rope, ...]:
        """See `Decoder`; norms after the rotation cancel any factor on it."""
        return tuple(replace(rope, attention_scaling=1.0) for rope in super().ropes(config, length))


class SmolLM3(Decoder):
    """SmolLM 3: every fourth layer rotates nothing."""

    def attention(self, config: PretrainedConfig, layer: int, length: int) -> Attention:
        """See `Decoder`."""
        window = self.window(config, layer, length) if config.use_sliding_window else None
        return Attention(rope=0 if config.no_rope_layers[layer] else None, window=window)


_NO_GATE = Names(gate_up=("mlp.up_proj",))
_GLM = Names(gate_up=("mlp.gate_up_proj",))
_ONE_NORM = Names(post_norm=None)
_GRANITE_MLP = Names(gate_up=("shared_mlp.input_linear",), down="shared_mlp.output_linear")
_GRANITE_SHARED: dict[str, Any] = {
    "shared": _GRANITE_MLP,
    "shared_width": "shared_intermediate_size",
}
_GRANITE_EXPERTS: dict[str, Any] = {
    "mixture": "block_sparse_moe",
    "router": "router",
    "expert_count": "num_local_experts",
    "expert_width": "intermediate_size",
}

_OTHERS: dict[str, Decoder] = {
    "apertus": Decoder(
        replace(
            HEAD_NORMS,
            input_norm="attention_layernorm",
            post_norm="feedforward_layernorm",
            gate_up=_NO_GATE.gate_up,
        ),
        gated=False,
    ),
    "arcee": Decoder(_NO_GATE, gated=False),
    "bitnet": Decoder(
        Names(output_sub_norm="self_attn.attn_sub_norm", down_sub_norm="mlp.ffn_sub_norm")
    ),
    "cohere": Cohere(
        _ONE_NORM, norm="layer", parallel=True, pairs="neighbours", refused=("use_qk_norm",)
    ),
    "cohere2": Cohere(
        _ONE_NORM,
        windows="listed",
        rotates="windows",
        norm="layer",
        parallel=True,
        pairs="neighbours",
    ),
    "cwm": Decoder(windows="listed"),
    "ernie4_5": Decoder(pairs="neighbours"),
    "exaone": Decoder(),
    "exaone4": Decoder(NORMS_BEHIND, windows="listed", rotates="windows if any"),
    "gemma": Gemma(norm_offset=1.0),
    "gemma2": Gemma(GEMMA, windows="listed", norm_offset=1.0),
    "gemma3_text": Gemma(GEMMA3, windows="listed", norm_offset=1.0),
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "glm": Decoder(_GLM, pairs="neighbours"),
    "glm4": Decoder(
        replace(_GLM, output_norm="post_self_attn_layernorm", down_norm="post_mlp_layernorm"),
        pairs="neighbours",
    ),
    "gpt_neox": HeadByHead(
        Names(
            embedding="gpt_neox.embed_in",
            layers="gpt_neox.layers",
            final_norm="gpt_neox.final_layer_norm",
            qkv=("attention.query_key_value",),
            output="attention.dense",
            gate_up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
        ),
        norm="layer",
        gated=False,
        parallel="use_parallel_residual",
    ),
    "granite": Granite(),
    "granite_swa": GraniteSWA(Names(sinks="self_attn.sinks"), windows="listed"),
    "granitemoe": GraniteMoe(**_GRANITE_EXPERTS),
    "granitemoe_swa": GraniteMoeSWA(
        Names(sinks="self_attn.sinks"), windows="listed", **_GRANITE_EXPERTS, **_GRANITE_SHARED
    ),
    "granitemoehybrid": GraniteHybrid(
        _GRANITE_MLP,
        windows="listed",
        inner="shared_intermediate_size",
        refused=("num_local_experts",),
    ),
    "granitemoeshared": GraniteMoe(**_GRANITE_EXPERTS, **_GRANITE_SHARED),
    "helium": Decoder(pairs="neighbours"),
    "hunyuan_v1_dense": Decoder(HUNYUAN, heads_normed="after"),
    "hyperclovax": HyperCLOVAX(
        Names(output_norm="post_norm1", down_norm="post_norm2"), needed=("use_post_norm",)
    ),
    "internlm3": Decoder(),
    "iquestcoder": Decoder(),
    "jais2": Decoder(_NO_GATE, norm="layer", gated=False),
    "lfm2": LFM2,
    "llama": Decoder(),
    "ministral": Decoder(windows="listed"),
    "ministral3": Ministral3(windows="all"),
    "mistral": Decoder(windows="all"),
    "nanochat": NanoChat(
        replace(HEAD_NORMS, gate_up=("mlp.fc1",), down="mlp.fc2"),
        pairs="swapped",
        norm_weights=False,
        gated=False,
        embedding_normed=True,
    ),
    "nemotron": Decoder(_NO_GATE, norm="layer", norm_offset=1.0, gated=False),
    "olmo": Decoder(norm="layer", norm_weights=False, norm_epsilon=1e-5, refused=("clip_qkv",)),
    "olmo2": Decoder(NORMS_BEHIND, heads_together=True),
    "olmo3": Decoder(NORMS_BEHIND, windows="listed", heads_together=True),
    "persimmon": HeadByHead(
        Names(
            final_norm="model.final_layernorm",
            qkv=("self_attn.query_key_value",),
            q_norm="self_attn.q_layernorm",
            k_norm="self_attn.k_layernorm",
            output="self_attn.dense",
            gate_up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
        ),
        norm="layer",
        gated=False,
        needed=("qk_layernorm",),
    ),
    "phi": Decoder(
        Names(
            final_norm="model.final_layernorm",
            output="self_attn.dense",
            post_norm=None,
            gate_up=("mlp.fc1",),
            down="mlp.fc2",
        ),
        norm="layer",
        gated=False,
        parallel=True,
        refused=("qk_layernorm",),
    ),
    "phi3": Decoder(
        Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)), windows="all"
    ),
    "qwen2": Decoder(windows="listed"),
    "qwen3": Decoder(HEAD_NORMS, windows="listed"),
    "qwen3_5_text": QWEN35,
    "seed_oss": Decoder(),
    "smollm3": SmolLM3(windows="listed"),
    "stablelm": Decoder(norm="layer", parallel="use_parallel_residual", refused=("qk_layernorm",)),
    "starcoder2": Decoder(
        Names(gate_up=("mlp.c_fc",), down="mlp.c_proj"), windows="all", norm="layer", gated=False
    ),
    "vaultgemma": Gemma(
        Names(post_norm="pre_feedforward_layernorm"), windows="listed", norm_offset=1.0
    ),
}

REGISTRY: dict[str, Decoder] = dict(sorted((_OTHERS | SPARSE).items()))
"""How each family differs from Llama."""


def architecture_of(config: PretrainedConfig) -> Decoder:
    """The family of a model.

    Raises:
        UnsupportedError: no supported family.
    """
    check_supported(config.model_type, REGISTRY)
    return REGISTRY[config.model_type]
