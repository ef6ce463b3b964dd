"""Families some of whose layers have a mixture of experts in place of their MLP, or beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from transformers import PretrainedConfig

from dash_onnx.core.block import Experts
from dash_onnx.core.errors import UnsupportedError
from dash_onnx.exporters.architectures.base import Layer, Linear, Mixture, ModelSpec, take
from dash_onnx.exporters.architectures.decoder import Decoder, Names
from dash_onnx.exporters.sources import Weights


@dataclass(frozen=True)
class Sparse(Decoder):
    """Decoders with experts in the layers that have a router.

    Attributes:
        mixture: name of all that a layer has for its experts: their weights, stacked as in
            transformers, and the router's.
        expert_width: key of the config for the width inside an expert.
        shared: names in a layer whose MLP computes beside the experts.
    """

    mixture: str = "mlp"
    expert_width: str = "moe_intermediate_size"
    shared: Names | None = None

    def experts(self, config: PretrainedConfig) -> Experts:
        """See `Decoder`."""
        if config.hidden_act != "silu":
            raise UnsupportedError(f"experts with activation {config.hidden_act!r}, not silu")
        count, chosen = int(config.num_experts), int(config.num_experts_per_tok)
        if not 1 <= chosen <= count:
            raise UnsupportedError(f"num_experts_per_tok {chosen} is not in 1..{count}")
        return Experts(
            count=count,
            per_token=chosen,
            width=int(getattr(config, self.expert_width)),
            shared_width=int(config.shared_expert_intermediate_size) if self.shared else 0,
            normalized=bool(config.norm_topk_prob),
        )

    def inside(
        self, weights: Weights, names: Names, prefix: str, spec: ModelSpec
    ) -> tuple[Names, int]:
        """See `Decoder`."""
        if not self._routes(weights, prefix):
            return super().inside(weights, names, prefix, spec)
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
        return f"{prefix}{self.mixture}.gate.weight" in weights

    def _mixture(self, weights: Weights, prefix: str, spec: ModelSpec) -> Mixture:
        sizes, width = spec.block.experts, spec.facts.hidden_size
        assert sizes is not None
        count, inner = sizes.count, sizes.width
        up = take(weights, f"{prefix}experts.gate_up_proj", count, 2 * inner, width)
        down = take(weights, f"{prefix}experts.down_proj", count, width, inner)
        in_turn = np.arange(2 * inner).reshape(2, inner).T.reshape(-1)
        gate = None
        if self.shared is not None:
            gate = Linear(
                "shared_gate", take(weights, f"{prefix}shared_expert_gate.weight", 1, width)
            )
        return Mixture(
            router=Linear("router", take(weights, f"{prefix}gate.weight", count, width)),
            up=Linear("experts_up", up[:, in_turn].flatten(0, 1)),
            down=Linear("experts_down", down.flatten(0, 1)),
            shared_gate=gate,
        )


_QUERY_KEY_NORMS = Names(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")

OLMOE = Sparse(
    _QUERY_KEY_NORMS,
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
QWEN3_MOE = Sparse(_QUERY_KEY_NORMS, windows="all")
