"""Families in which some layers have a mixture of experts instead of, or alongside, the MLP."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PretrainedConfig

from dash_onnx.core.block import Experts
from dash_onnx.core.errors import UnsupportedError
from dash_onnx.exporters.architectures.base import Layer, Linear, Mixture, ModelSpec, take
from dash_onnx.exporters.architectures.decoder import Decoder
from dash_onnx.exporters.architectures.hybrid import LFM2, Lfm2
from dash_onnx.exporters.architectures.names import HEAD_NORMS, NORMS_BEHIND, Names
from dash_onnx.exporters.sources import Weights


@dataclass(frozen=True)
class Sparse(Decoder):
    """Decoders with experts in the layers that have a router.

    Attributes:
        mixture: prefix of the expert weights of a layer, which are stacked as in transformers, and
            of the router's.
        router: name of the router under it.
        expert_count: config key for the number of experts in a layer.
        expert_width: config key for the width inside an expert.
        shared: names in a layer whose MLP runs alongside the experts.
    """

    mixture: str = "mlp"
    router: str = "gate"
    expert_count: str = "num_experts"
    expert_width: str = "moe_intermediate_size"
    shared: Names | None = None

    def experts(self, config: PretrainedConfig) -> Experts:
        """See `Decoder`."""
        if (name := getattr(config, "hidden_act", "silu")) != "silu":
            raise UnsupportedError(f"experts with activation {name!r} are not supported, only silu")
        count, chosen = int(getattr(config, self.expert_count)), int(config.num_experts_per_tok)
        if not 1 <= chosen <= count:
            raise UnsupportedError(f"num_experts_per_tok {chosen} is not in 1..{count}")
        return Experts(
            count=count,
            per_token=chosen,
            width=int(getattr(config, self.expert_width)),
            shared_width=int(config.shared_expert_intermediate_size) if self.shared else 0,
            normalized=bool(getattr(config, "norm_topk_prob", True)),
        )

    def inside(
        self, weights: Weights, names: Names, index: int, spec: ModelSpec
    ) -> tuple[Names, int]:
        """See `Decoder`."""
        if not self._routes(weights, f"{self.names.layers}.{index}."):
            return super().inside(weights, names, index, spec)
        assert spec.block.experts is not None
        if self.shared is None:
            return replace(names, gate_up=(), down=None), 0
        shared = replace(names, gate_up=self.shared.gate_up, down=self.shared.down)
        return shared, spec.block.experts.shared_width

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
        router, gate, bias = f"{prefix}{self.router}", None, None
        if self.shared is not None:
            gate = Linear(
                "shared_gate", take(weights, f"{prefix}shared_expert_gate.weight", 1, width)
            )
        if f"{router}.bias" in weights:
            bias = take(weights, f"{router}.bias", sizes.count)
        choice = f"{prefix}expert_bias"
        return Mixture(
            router=Linear("router", take(weights, f"{router}.weight", sizes.count, width), bias),
            up=up,
            down=down,
            shared_gate=gate,
            choice_bias=take(weights, choice, sizes.count) if choice in weights else None,
        )

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
    """LFM 2 with experts after its first layers: the router's scores are independent."""

    def inner_size(self, config: PretrainedConfig) -> int:
        """See `Decoder`."""
        return int(config.intermediate_size)

    def experts(self, config: PretrainedConfig) -> Experts:
        """See `Decoder`."""
        factor = float(config.routed_scaling_factor)
        return replace(super().experts(config), scoring="sigmoid", factor=factor)


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


GPT_OSS = GptOss(
    Names(sinks="self_attn.sinks"),
    windows="listed",
    router="router",
    expert_count="num_local_experts",
    expert_width="intermediate_size",
)
LFM2_MOE = Lfm2Moe(
    LFM2.names,
    recurrent_names=LFM2.recurrent_names,
    conv=LFM2.conv,
    needed=("norm_topk_prob",),
    mixture="feed_forward",
)

FLEX_OLMO = Sparse(NORMS_BEHIND, heads_together=True, expert_width="intermediate_size")
MELLUM = Sparse(HEAD_NORMS, windows="listed")
MIXTRAL = Sparse(windows="all", expert_count="num_local_experts", expert_width="intermediate_size")
OLMOE = Sparse(
    HEAD_NORMS,
    heads_together=True,
    refused=("clip_qkv",),
    expert_width="intermediate_size",
)
QWEN2_MOE = Sparse(
    windows="listed",
    shared=Names(
        gate_up=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        down="mlp.shared_expert.down_proj",
    ),
)
QWEN3_MOE = Sparse(HEAD_NORMS, windows="all")
