"""Families in which some layers have a mixture of experts instead of, or alongside, the MLP."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from transformers import PretrainedConfig

from dash_onnx.core.block import Block, Experts
from dash_onnx.core.errors import UnsupportedError
from dash_onnx.exporters.architectures.base import (
    Layer,
    Linear,
    Mixture,
    ModelSpec,
    Scales,
    check_shape,
    take,
)
from dash_onnx.exporters.architectures.decoder import Decoder, declared
from dash_onnx.exporters.architectures.hybrid import LFM2, QWEN35, Lfm2, Qwen35
from dash_onnx.exporters.architectures.names import HEAD_NORMS, HUNYUAN, NORMS_BEHIND, Names
from dash_onnx.exporters.sources import Weights


@dataclass(frozen=True)
class Sparse(Decoder):
    """Decoders with experts in the layers that have a router.

    Attributes:
        mixture: prefix of the expert weights of a layer, which are stacked as in transformers, and
            of the router's.
        router: name of the router under it.
        choice_bias: name under it of what is added to the experts' weights only when choosing
            experts; empty if there is none.
        scoring: see `Experts`.
        factor: config key for the factor on the sum of a token's experts; empty for 1.
        expert_count: config key for the number of experts in a layer.
        expert_width: config key for the width inside an expert.
        shared: names in a layer whose MLP runs alongside the experts.
        shared_gate: name under `mixture` of the gate of that MLP; empty if it has none.
        shared_width: config key for the width inside that MLP.
        shared_count: config key for the same as a number of experts; empty if the width has a key.
    """

    mixture: str = "mlp"
    router: str = "gate"
    choice_bias: str = ""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    factor: str = ""
    expert_count: str = "num_experts"
    expert_width: str = "moe_intermediate_size"
    shared: Names | None = None
    shared_gate: str = ""
    shared_width: str = "shared_expert_intermediate_size"
    shared_count: str = ""

    def experts(self, config: PretrainedConfig) -> Experts:
        """See `Decoder`."""
        if (name := getattr(config, "hidden_act", "silu")) != "silu":
            raise UnsupportedError(f"experts with activation {name!r} are not supported, only silu")
        if (groups := getattr(config, "n_group", None) or 1) > 1:
            raise UnsupportedError(f"n_group is {groups}: experts chosen by group, not supported")
        count = int(getattr(config, self.expert_count))
        chosen = _same(config, "num_experts_per_tok")
        if not 1 <= chosen <= count:
            raise UnsupportedError(f"num_experts_per_tok {chosen} is not in 1..{count}")
        width, shared = int(getattr(config, self.expert_width)), 0
        if self.shared_count:
            shared = width * int(getattr(config, self.shared_count) or 0)
        elif self.shared:
            shared = int(getattr(config, self.shared_width))
        return Experts(
            count=count,
            per_token=chosen,
            width=width,
            shared_width=shared,
            normalized=declared(config, "norm_topk_prob") is not False,
            scoring=self.scoring,
            factor=float(getattr(config, self.factor)) if self.factor else 1.0,
        )

    def inside(
        self, weights: Weights, names: Names, index: int, spec: ModelSpec
    ) -> tuple[Names, int]:
        """See `Decoder`."""
        if not self._routes(weights, f"{self.names.layers}.{index}."):
            return super().inside(weights, names, index, spec)
        assert spec.block.experts is not None
        width = spec.block.experts.shared_width
        if self.shared is None or not width:
            return replace(names, gate_up=(), down=None), 0
        return replace(names, gate_up=self.shared.gate_up, down=self.shared.down), width

    def layer(self, weights: Weights, index: int, spec: ModelSpec) -> Layer:
        """See `Decoder`."""
        layer, prefix = super().layer(weights, index, spec), f"{self.names.layers}.{index}."
        if not self._routes(weights, prefix):
            return layer
        return replace(layer, mixture=self._mixture(weights, f"{prefix}{self.mixture}.", spec))

    def _routes(self, weights: Weights, prefix: str) -> bool:
        return f"{prefix}{self.mixture}.{self.router}.weight" in weights

    def _mixture(self, weights: Weights, prefix: str, spec: ModelSpec) -> Mixture:
        sizes, width = spec.block.experts, spec.facts.hidden_size
        assert sizes is not None
        up, down = self.stacked(weights, f"{prefix}experts.", sizes, width)
        name, gate, bias, choice = f"{prefix}{self.router}", None, None, None
        router = take(weights, f"{name}.weight", sizes.count, width)
        if self.shared_gate:
            opens = take(weights, f"{prefix}{self.shared_gate}.weight", 1, width)
            gate = Linear("shared_gate", opens)
        if f"{name}.bias" in weights:
            bias = take(weights, f"{name}.bias", sizes.count)
        if self.choice_bias:
            choice = weights[f"{prefix}{self.choice_bias}"].flatten()
            check_shape(f"{prefix}{self.choice_bias}", tuple(choice.shape), (sizes.count,))
        return Mixture(Linear("router", router, bias), up, down, gate, choice)

    def stacked(
        self, weights: Weights, prefix: str, sizes: Experts, width: int
    ) -> tuple[Linear, Linear]:
        """Both projections of all experts, in the order of `Mixture`."""
        count, inner = sizes.count, sizes.width
        up = take(weights, f"{prefix}gate_up_proj", count, 2 * inner, width)
        down = take(weights, f"{prefix}down_proj", count, width, inner)
        in_turn = np.arange(2 * inner).reshape(2, inner).T.reshape(-1)
        return _stacked("experts_up", up[:, in_turn]), _stacked("experts_down", down)


@dataclass(frozen=True)
class Lfm2Moe(Sparse, Lfm2):
    """LFM 2 with experts after its first layers."""


@dataclass(frozen=True)
class Qwen35Moe(Sparse, Qwen35):
    """Qwen 3.5 with experts."""


class Qwen3Next(Qwen35Moe):
    """Qwen 3 Next: projections of Gated DeltaNets stacked by key head."""

    def recurrent_input(self, stacked: Linear, spec: ModelSpec) -> Linear:
        """See `Hybrid`: each key head has a query, a key, and values and gates of some heads."""
        sizes = spec.recurrence
        assert sizes is not None
        values = sizes.value_width // sizes.key_heads
        rows = np.arange(stacked.out_features).reshape(sizes.key_heads, -1)
        ends = np.cumsum([sizes.key_dim, sizes.key_dim, values])
        parts = (part.reshape(-1) for part in np.split(rows, ends, axis=1))
        return stacked.reordered(np.concatenate([*parts]))

    def gates(self, weights: Weights, prefix: str, heads: int, spec: ModelSpec) -> Linear:
        """See `Qwen35`: each key head has the update rates of some value heads, and the decays."""
        sizes, width = spec.recurrence, spec.facts.hidden_size
        assert sizes is not None
        both = Linear("gates", take(weights, f"{prefix}in_proj_ba.weight", 2 * heads, width))
        rows = np.arange(2 * heads).reshape(sizes.key_heads, 2, -1)
        return both.reordered(rows[:, ::-1].swapaxes(0, 1).reshape(-1))


class Glm4Moe(Sparse):
    """GLM 4.5 and later: only the larger models have norms of queries and keys."""

    def inside(
        self, weights: Weights, names: Names, index: int, spec: ModelSpec
    ) -> tuple[Names, int]:
        """See `Decoder`."""
        if f"{names.layers}.{index}.{names.q_norm}.weight" not in weights:
            names = replace(names, q_norm=None, k_norm=None)
        return super().inside(weights, names, index, spec)


class Afmoe(Sparse):
    """Arcee Trinity: a projection of its own for the gates of the heads."""

    def block(self, config: PretrainedConfig) -> Block:
        """See `Decoder`."""
        return replace(super().block(config), heads_gated=True)

    def scales(self, config: PretrainedConfig) -> Scales:
        """See `Decoder`."""
        return Scales(embedding=float(config.hidden_size**0.5) if config.mup_enabled else 1.0)


class GptOss(Sparse):
    """gpt-oss: experts with biases and a bounded activation, stored transposed."""

    def experts(self, config: PretrainedConfig) -> Experts:
        """See `Decoder`."""
        slope, limit = float(config.swiglu_alpha), float(config.swiglu_limit)
        return replace(super().experts(config), gate_slope=slope, up_offset=1.0, limit=limit)

    def stacked(
        self, weights: Weights, prefix: str, sizes: Experts, width: int
    ) -> tuple[Linear, Linear]:
        """See `Sparse`."""
        count, inner = sizes.count, sizes.width
        up = take(weights, f"{prefix}gate_up_proj", count, width, 2 * inner)
        down = take(weights, f"{prefix}down_proj", count, inner, width)
        up_bias = take(weights, f"{prefix}gate_up_proj_bias", count, 2 * inner)
        down_bias = take(weights, f"{prefix}down_proj_bias", count, width)
        return (
            _stacked("experts_up", up.transpose(1, 2), up_bias),
            _stacked("experts_down", down.transpose(1, 2), down_bias),
        )


def _stacked(name: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """From `[E, N, K]` and `[E, N]`."""
    return Linear(name, weight.flatten(0, 1), None if bias is None else bias.flatten())


def _same(config: PretrainedConfig, key: str) -> int:
    """A number from a config that may list it for each layer.

    Raises:
        UnsupportedError: it differs between layers.
    """
    value: Any = getattr(config, key)
    values = {*value} if isinstance(value, list) else {value}
    if len(values) > 1:
        raise UnsupportedError(f"{key} {value}: layers that differ in it are not supported")
    return int(values.pop())


_QWEN_SHARED = Names(
    gate_up=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    down="mlp.shared_expert.down_proj",
)
_SHARED = Names(
    gate_up=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    down="mlp.shared_experts.down_proj",
)
_CORRECTED: dict[str, Any] = {
    "choice_bias": "gate.e_score_correction_bias",
    "scoring": "sigmoid",
    "factor": "routed_scaling_factor",
    "needed": ("norm_topk_prob",),
    "shared": _SHARED,
}
"""Experts as in DeepSeek V3: a bias corrects their choice."""
_ROUTED: dict[str, Any] = {
    **_CORRECTED,
    "expert_count": "n_routed_experts",
    "shared_count": "n_shared_experts",
}

SPARSE: dict[str, Decoder] = {
    "afmoe": Afmoe(
        replace(
            HEAD_NORMS,
            qkv=(*HEAD_NORMS.qkv, "self_attn.gate_proj"),
            output_norm="post_attention_layernorm",
            post_norm="pre_mlp_layernorm",
            down_norm="post_mlp_layernorm",
        ),
        windows="listed",
        rotates="windows",
        router="router.gate",
        choice_bias="expert_bias",
        scoring="sigmoid",
        factor="route_scale",
        shared=_SHARED,
        shared_count="num_shared_experts",
    ),
    "dots1": Sparse(HEAD_NORMS, windows="listed", **_ROUTED),
    "ernie4_5_moe": Sparse(
        pairs="neighbours",
        choice_bias="gate.moe_statics.e_score_correction_bias",
        shared=_SHARED,
        shared_count="moe_num_shared_experts",
    ),
    "exaone_moe": Sparse(
        HEAD_NORMS,
        windows="listed",
        rotates="windows if any",
        shared_count="num_shared_experts",
        **_CORRECTED,
    ),
    "flex_olmo": Sparse(NORMS_BEHIND, heads_together=True, expert_width="intermediate_size"),
    "flint": Sparse(
        replace(HEAD_NORMS, sinks="self_attn.sinks"),
        windows="listed",
        rotates="windows",
        scoring="sigmoid",
        needed=("norm_topk_prob",),
        shared=_QWEN_SHARED,
    ),
    "glm4_moe": Glm4Moe(HEAD_NORMS, **_ROUTED),
    "gpt_oss": GptOss(
        Names(sinks="self_attn.sinks"),
        windows="listed",
        router="router",
        expert_count="num_local_experts",
        expert_width="intermediate_size",
    ),
    "hunyuan_v1_moe": Sparse(
        HUNYUAN,
        heads_normed="after",
        router="gate.wg",
        expert_width="intermediate_size",
        shared=Names(
            gate_up=("mlp.shared_mlp.gate_proj", "mlp.shared_mlp.up_proj"),
            down="mlp.shared_mlp.down_proj",
        ),
        shared_width="intermediate_size",
    ),
    "hy_v3": Sparse(
        HEAD_NORMS,
        choice_bias="e_score_correction_bias",
        scoring="sigmoid",
        factor="router_scaling_factor",
        shared=_SHARED,
        shared_count="num_shared_experts",
    ),
    "lfm2_moe": Lfm2Moe(
        LFM2.names,
        recurrent_names=LFM2.recurrent_names,
        conv=LFM2.conv,
        needed=("norm_topk_prob", "use_expert_bias"),
        mixture="feed_forward",
        choice_bias="expert_bias",
        scoring="sigmoid",
        factor="routed_scaling_factor",
    ),
    "mellum": Sparse(HEAD_NORMS, windows="listed"),
    "minimax_m2": Sparse(
        HEAD_NORMS,
        heads_together=True,
        choice_bias="e_score_correction_bias",
        scoring="sigmoid",
        expert_count="num_local_experts",
        expert_width="intermediate_size",
    ),
    "mixtral": Sparse(
        windows="all", expert_count="num_local_experts", expert_width="intermediate_size"
    ),
    "olmoe": Sparse(
        HEAD_NORMS,
        heads_together=True,
        refused=("clip_qkv",),
        expert_width="intermediate_size",
    ),
    "qwen2_moe": Sparse(windows="listed", shared=_QWEN_SHARED, shared_gate="shared_expert_gate"),
    "qwen3_5_moe_text": Qwen35Moe(
        HEAD_NORMS,
        recurrent_names=QWEN35.recurrent_names,
        norm_offset=QWEN35.norm_offset,
        conv=QWEN35.conv,
        inner="moe_intermediate_size",
        shared=_QWEN_SHARED,
        shared_gate="shared_expert_gate",
    ),
    "qwen3_moe": Sparse(HEAD_NORMS, windows="all"),
    "qwen3_next": Qwen3Next(
        HEAD_NORMS,
        recurrent_names=Names(qkv=("linear_attn.in_proj_qkvz",), output="linear_attn.out_proj"),
        norm_offset=QWEN35.norm_offset,
        conv=QWEN35.conv,
        shared=_QWEN_SHARED,
        shared_gate="shared_expert_gate",
    ),
    "solar_open": Sparse(inner="moe_intermediate_size", **_ROUTED),
}
"""The families with experts, except those with Granite's multipliers."""
