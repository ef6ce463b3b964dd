"""The common part of all families: maps config and weights to the description in `base`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import PretrainedConfig

from dash_onnx.core.block import (
    ATTENTIONS,
    Activation,
    Attention,
    Block,
    Experts,
    Mixer,
    QueryScale,
    Recurrence,
)
from dash_onnx.core.consistency import model_problems
from dash_onnx.core.errors import SourceError, UnsupportedError
from dash_onnx.core.facts import ModelFacts, Rope
from dash_onnx.exporters.architectures.base import (
    Head,
    Layer,
    Linear,
    ModelSpec,
    Norm,
    PerLayer,
    Scales,
    stack,
    take,
)
from dash_onnx.exporters.architectures.names import LLAMA, Names
from dash_onnx.exporters.architectures.rope import (
    LAYER_TYPES,
    Pairs,
    context_length,
    head_order,
    rope_of,
    widened,
)
from dash_onnx.exporters.sources import Weights, readable

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "xielu": "xielu",
}
F = torch.nn.functional

_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Decoder:
    """A dense decoder, with Llama's defaults; a family that computes differently overrides methods.

    Attributes:
        names: names of its weights.
        recurrent_names: names of the weights of its layers without attention.
        windows: layers that see only the last `sliding_window` (from the config) tokens; `listed`
            means those that the config's `layer_types` marks so.
        rotates: layers that have a rotary embedding: all, those with a window, or those with a
            window in a model that has windows.
        pairs: dimensions of a head that rotate together.
        norm: see `Block`.
        norm_epsilon: epsilon of norms; None reads the config's.
        norm_offset: added to the weights of norms when they are read.
        norm_weights: whether norms have weights.
        heads_together: whether the norms of queries and keys each span all heads.
        heads_normed: see `Block`.
        inner: config key for the width inside the MLP.
        gated: see `Block`.
        parallel: see `Block`; a string is a config key.
        refused: config keys that, when set, ask for something the graphs do not have.
        needed: config keys that do so when not set.
        embedding_normed: see `ModelSpec`.
    """

    names: Names = LLAMA
    recurrent_names: Names | None = None
    windows: Literal["none", "all", "listed"] = "none"
    rotates: Literal["all", "windows", "windows if any"] = "all"
    pairs: Pairs = "halves"
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float | None = None
    norm_offset: float = 0.0
    norm_weights: bool = True
    heads_together: bool = False
    heads_normed: Literal["before", "after"] = "before"
    inner: str = "intermediate_size"
    gated: bool = True
    parallel: bool | str = False
    refused: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    embedding_normed: bool = False

    def describe(self, name: str, config: PretrainedConfig, max_length: int | None) -> ModelSpec:
        """Maps the config, for contexts of `max_length` tokens; None takes the model's own.

        Raises:
            UnsupportedError: the config asks for something that the graphs do not have.
            ContextLengthError: the model cannot have such a context.
            SourceError: the config has an impossible value.
        """
        what = f"the configuration of {name}"
        spec = readable(what, lambda: self._described(name, config, max_length))
        for problem in model_problems(spec.facts):
            raise SourceError(f"{what}: {problem}")
        if not 0 < spec.block.norm_epsilon < 1:
            raise SourceError(f"{what}: the epsilon of norms is {spec.block.norm_epsilon}")
        return spec

    def _described(self, name: str, config: PretrainedConfig, max_length: int | None) -> ModelSpec:
        both = getattr(config, "use_bidirectional_attention", None)  # each family has its own
        if getattr(config, "is_causal", True) is False and not both:
            raise UnsupportedError("is_causal is false: not a causal model")
        for key in (*self.refused, *self.needed):
            if bool(value := getattr(config, key, None)) != (key in self.needed):
                raise UnsupportedError(f"{config.model_type} with {key} {value} is not supported")
        length, mixers = context_length(config, max_length), self.mixers(config)
        if "attention" not in (mixers or ("attention",)):
            raise UnsupportedError("no layer has attention: models without any are not supported")
        hybrid, recurrent = (bool({*mixers} - {*kinds}) for kinds in (ATTENTIONS[:1], ATTENTIONS))
        heads, head = config.num_attention_heads, _head_dim(config)
        ropes = tuple(widened(rope, head) for rope in self.ropes(config, length))
        return ModelSpec(
            facts=ModelFacts(
                name=name,
                architecture=config.model_type,
                num_layers=config.num_hidden_layers,
                hidden_size=config.hidden_size,
                intermediate_size=self.inner_size(config),
                num_heads=heads,
                num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
                head_dim=head,
                vocab_size=config.vocab_size,
                max_length=length,
            ),
            block=replace(self.block(config), query_scale=self.query_scale(config, length)),
            ropes=ropes,
            attention=tuple(
                self.attention(config, index, length) for index in range(config.num_hidden_layers)
            ),
            scales=self.scales(config),
            embedding_normed=self.embedding_normed,
            mixers=mixers if hybrid else (),
            recurrence=self.recurrence(config) if recurrent else None,
        )

    def inner_size(self, config: PretrainedConfig) -> int:
        """Width inside the MLP."""
        return int(getattr(config, self.inner))

    def block(self, config: PretrainedConfig) -> Block:
        """What all layers compute."""
        name = declared(config, "hidden_activation") or declared(config, "hidden_act") or "silu"
        if name not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise UnsupportedError(f"activation {name!r} is not supported; supported: {known}")
        epsilons = [float(value) for key in _EPSILONS if (value := declared(config, key))]
        parallel = self.parallel
        return Block(
            norm=self.norm,
            norm_epsilon=epsilons[0] if self.norm_epsilon is None else self.norm_epsilon,
            activation=_ACTIVATIONS[name],
            gated=self.gated,
            parallel=parallel if isinstance(parallel, bool) else bool(getattr(config, parallel)),
            attention_scale=_head_dim(config) ** -0.5,
            attention_softcap=declared(config, "attn_logit_softcapping") or None,
            logit_softcap=declared(config, "final_logit_softcapping") or None,
            heads_normed=self.heads_normed,
            experts=self.experts(config),
        )

    def experts(self, config: PretrainedConfig) -> Experts | None:
        """Sizes of the mixtures of experts; a family that has them overrides this."""
        for key in _EXPERTS:
            if (count := getattr(config, key, None) or 1) > 1:
                what = f"mixtures of experts are not supported in {config.model_type}"
                raise UnsupportedError(f"{key} is {count}: {what}")
        return None

    def mixers(self, config: PretrainedConfig) -> tuple[Mixer, ...]:
        """Mixer of each layer, see `Manifest`; empty where all layers have attention."""
        return ()

    def recurrence(self, config: PretrainedConfig) -> Recurrence | None:
        """Sizes of the layers without attention."""
        return None

    def ropes(self, config: PretrainedConfig, length: int) -> tuple[Rope, ...]:
        """Rotary embeddings for contexts of `length` tokens: one, or one for each type of layer."""
        if LAYER_TYPES[0] in (config.rope_parameters or {}):
            return tuple(rope_of(config, length, kind) for kind in LAYER_TYPES)
        return (rope_of(config, length),)

    def query_scale(self, config: PretrainedConfig, length: int) -> QueryScale | None:
        """Factor on the queries in contexts of `length` tokens."""
        return None

    def attention(self, config: PretrainedConfig, layer: int, length: int) -> Attention:
        """Attention of one layer, in contexts of `length` tokens."""
        kind, window = self.layer_type(config, layer), self.window(config, layer, length)
        if kind == "full_attention" and self.rotates != "all":
            if self.rotates == "windows" or config.sliding_window is not None:
                return Attention(rope=None, window=None)
        several = len(self.ropes(config, length)) > 1
        return Attention(rope=LAYER_TYPES.index(kind) if several else 0, window=window)

    def window(self, config: PretrainedConfig, layer: int, length: int) -> int | None:
        """Number of tokens that a layer sees, in contexts of `length` tokens; None for all."""
        sliding = self.layer_type(config, layer) == "sliding_attention"
        window = config.sliding_window if sliding else None
        return None if window is None or window >= length else int(window)

    def layer_type(self, config: PretrainedConfig, layer: int) -> str:
        """One of `LAYER_TYPES`.

        Raises:
            UnsupportedError: the layer has attention of another type.
        """
        if self.windows != "listed":
            return "full_attention" if self.windows == "none" else "sliding_attention"
        kind: str = config.layer_types[layer]
        if kind not in LAYER_TYPES:
            raise UnsupportedError(
                f"layer {layer} is of type {kind!r}; supported: {', '.join(LAYER_TYPES)}"
            )
        return kind

    def scales(self, config: PretrainedConfig) -> Scales:
        """Factors of the model."""
        return Scales()

    def per_layer(self, weights: Weights, spec: ModelSpec) -> PerLayer | None:
        """The token embeddings that each layer reads directly."""
        return None

    def embedding(self, weights: Weights, spec: ModelSpec) -> torch.Tensor:
        """Token embedding `[V, D]`."""
        facts = spec.facts
        return take(weights, f"{self.names.embedding}.weight", facts.vocab_size, facts.hidden_size)

    def layer(self, weights: Weights, index: int, spec: ModelSpec) -> Layer:
        """Weights of one decoder layer."""
        names, facts, attends = self.names, spec.facts, spec.attends(index)
        if not attends:
            assert self.recurrent_names is not None
            names = self.recurrent_names
        prefix = f"{names.layers}.{index}."
        names, inner = self.inside(weights, names, index, spec)
        width, (kv_heads, head) = facts.hidden_size, spec.heads_of(index)
        queries, keys = facts.num_heads * head, kv_heads * head
        inners = [inner] * (2 if spec.block.gated else 1)
        order = self.head_order(spec.ropes[0], head) if attends else None
        post_norm = names.post_norm
        if spec.block.parallel and f"{prefix}{post_norm}.weight" not in weights:
            post_norm = None

        def norm(name: str | None, size: int = width) -> Norm | None:
            return None if name is None else self._norm(weights, prefix + name, size)

        def added(name: str | None) -> Norm | None:
            found, factor = norm(name), spec.scales.residual
            return found if found is None or factor == 1.0 else found.scaled(factor)

        def head_norm(name: str | None, count: int) -> Norm | None:
            found = norm(name, count * head if self.heads_together else head)
            return found and found.reordered(order)

        def linear(name: str, short: str, rows: int, columns: int) -> Linear:
            return linear_at(weights, prefix + name, short, rows, columns)

        def stacked(short: str, parts: tuple[str, ...], *rows: int) -> Linear:
            if len(parts) == 1:
                return linear(parts[0], short, sum(rows), width)
            sizes = zip(parts, rows, strict=True)
            return stack(short, *(linear(part, part, size, width) for part, size in sizes))

        if attends:
            own = () if spec.mixer_of(index) == "shared_attention" else (keys, keys)
            gates = queries if spec.block.heads_gated else 0
            rows: tuple[int, ...] = (queries + gates, *own)
            if len(names.qkv) > len(own) + 1:
                rows = queries, *own, gates
            qkv = self.qkv(stacked("qkv_proj", names.qkv, *rows), spec)
            qkv = _paired(qkv, (queries + keys) // head, order)
        else:
            sizes = spec.recurrence
            assert sizes is not None
            queries, rows = sizes.value_width, (sizes.channels, sizes.value_width)
            if not sizes.value_width:  # a short convolution
                queries, rows = width, (width,) * 3
            qkv = stacked("in_proj", names.qkv, *rows)
        return Layer(
            input_norm=norm(names.input_norm),
            qkv=qkv,
            q_norm=head_norm(names.q_norm, facts.num_heads),
            k_norm=head_norm(names.k_norm, kv_heads),
            output=linear(names.output, "o_proj", width, queries),
            output_norm=added(names.output_norm),
            post_norm=norm(post_norm),
            gate_up=stacked("gate_up_proj", names.gate_up, *inners) if names.gate_up else None,
            down=linear(names.down, "down_proj", width, inner) if names.down else None,
            down_norm=added(names.down_norm),
            output_sub_norm=norm(names.output_sub_norm, queries),
            down_sub_norm=norm(names.down_sub_norm, inner),
            sinks=take(weights, prefix + names.sinks, facts.num_heads) if names.sinks else None,
            xielu=self.xielu(weights, prefix) if spec.block.activation == "xielu" else None,
        )

    def inside(
        self, weights: Weights, names: Names, index: int, spec: ModelSpec
    ) -> tuple[Names, int]:
        """Names of a layer's weights, and the inner width of its MLP."""
        return names, spec.facts.intermediate_size

    def xielu(self, weights: Weights, prefix: str) -> torch.Tensor:
        """Factors of a layer's activation, see `Layer`."""
        square, expm1 = (
            F.softplus(take(weights, f"{prefix}mlp.act_fn.{name}", 1).float())
            for name in ("alpha_p", "alpha_n")
        )
        beta = f"{prefix}mlp.act_fn.beta"  # models with random weights store none
        linear = weights[beta].float().reshape(1) if beta in weights else square.new_full([1], 0.5)
        # For x < 0 it is `a (exp(x) - 1 - x) + beta x`, with a = softplus(alpha_n) + beta.
        return torch.cat([-expm1, square, linear + expm1])

    def qkv(self, stacked: Linear, spec: ModelSpec) -> Linear:
        """Puts rows into the order of the graphs: all queries, all keys, all values."""
        return stacked

    def head(self, weights: Weights, spec: ModelSpec) -> Head:
        """Final norm and LM head; the head may be the embedding (tied)."""
        facts, names = spec.facts, self.names
        # As in transformers: a stored head is used, whatever the config says about it.
        name = names.head if f"{names.head}.weight" in weights else names.embedding
        linear = linear_at(weights, name, "lm_head", facts.vocab_size, facts.hidden_size)
        if (bias := f"{names.head}.bias") in weights:  # also where the weight is tied
            linear = replace(linear, bias=take(weights, bias, facts.vocab_size))
        norm = self._norm(weights, names.final_norm, facts.hidden_size)
        scale = spec.scales.logit / (spec.block.logit_softcap or 1.0)
        return Head(norm if scale == 1.0 else norm.scaled(scale), linear)

    def head_order(self, rope: Rope, head: int) -> npt.NDArray[np.int64] | None:
        """Source index of each dimension of a head; None where the order stays."""
        return head_order(rope, head, self.pairs)

    def _norm(self, weights: Weights, name: str, size: int) -> Norm:
        if not self.norm_weights:
            return Norm(torch.ones(size))
        weight, bias = take(weights, f"{name}.weight", size), f"{name}.bias"
        if self.norm_offset:
            weight = weight.float() + self.norm_offset
        return Norm(weight, take(weights, bias, size) if bias in weights else None)


def _paired(qkv: Linear, count: int, order: npt.NDArray[np.int64] | None) -> Linear:
    """Reorders the dimensions of query and key heads for the rotation."""
    if order is None:
        return qkv
    heads = np.arange(count) * len(order)
    turned = (heads[:, None] + order).reshape(-1)
    return qkv.reordered(np.concatenate([turned, np.arange(len(turned), qkv.out_features)]))


def declared(config: PretrainedConfig, key: str) -> Any:
    """A field of the family's configuration; None if it has none, whatever config.json says."""
    return getattr(config, key) if key in {one.name for one in fields(type(config))} else None


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def linear_at(weights: Weights, name: str, short: str, rows: int, columns: int) -> Linear:
    """The linear layer `[rows, columns]` under a name, with its bias and integers, if any."""
    weight, bias = f"{name}.weight", f"{name}.bias"
    return Linear(
        short,
        take(weights, weight, rows, columns),
        take(weights, bias, rows) if bias in weights else None,
        weights.packed(weight),
    )
