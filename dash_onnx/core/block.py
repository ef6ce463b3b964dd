"""What the decoder layers of a model compute, apart from their sizes and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "xielu"]

AttentionForms = Literal["grouped", "both"]
"""GroupQueryAttention alone, or also plain operators, between which the runtime chooses."""

Mixer = Literal["attention", "shared_attention", "short_conv", "gated_delta"]
"""How a layer mixes tokens: by attention, whose K/V grow with the text; by attention over the K/V
of an earlier layer; or with a state of fixed size, by a short convolution or Gated DeltaNet."""

ATTENTIONS: tuple[Mixer, ...] = ("attention", "shared_attention")
"""The mixers that attend."""


@dataclass(frozen=True)
class Recurrence:
    """Sizes of the layers that keep a state of fixed size, all alike.

    Attributes:
        kernel: tokens that their convolution sees, the new one included.
        channels: channels of the convolution.
        key_heads: heads of queries and keys of Gated DeltaNet; 0 without it, like those that
            follow.
        value_heads: heads of its values, each with a state `[key_dim, value_dim]`.
        key_dim: width of a head of queries or keys.
        value_dim: width of a head of values.
    """

    kernel: int
    channels: int
    key_heads: int = 0
    value_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0

    @property
    def key_width(self) -> int:
        """Width of all queries of a token, and of all its keys."""
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        """Width of all values of a token."""
        return self.value_heads * self.value_dim


@dataclass(frozen=True)
class QueryScale:
    """Factor on the queries at position p: `1 + beta * ln(1 + floor(p / length))`.

    Attributes:
        beta: strength of the scaling; 0 would leave the queries as they are.
        length: tokens below which the factor is 1.
    """

    beta: float
    length: int


@dataclass(frozen=True)
class Experts:
    """What the layers with a mixture of experts have in common; the other layers have one MLP.

    Attributes:
        count: experts of a layer.
        per_token: experts that compute for a token (`top_k`): those with the router's highest
            scores, after a layer's correction bias (`e_score_correction_bias`) if it has one.
        width: width inside an expert.
        shared_width: width inside the MLP that computes for every token beside them, or 0.
        normalized: whether the weights of a token's experts sum to 1 (`norm_topk_prob`); if not,
            each keeps its value among those of all experts.
        scoring: what turns the router's scores into weights.
        factor: factor on the sum of a token's experts (`routed_scaling_factor`).
        gate_slope: a in the experts' activation `gate * sigmoid(a * gate) * (up + b)`.
        up_offset: b.
        limit: upper bound of gates, and of the absolute value of ups, in the activation; or None.
    """

    count: int
    per_token: int
    width: int
    shared_width: int = 0
    normalized: bool = True
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    factor: float = 1.0
    gate_slope: float = 1.0
    up_offset: float = 0.0
    limit: float | None = None


@dataclass(frozen=True)
class Block:
    """What all layers have in common; the weights determine where a layer has a norm or a bias.

    Attributes:
        norm: RMSNorm, or LayerNorm, which subtracts the mean.
        norm_epsilon: epsilon of every norm.
        activation: that of the MLP; `gelu_tanh` is GELU in its tanh approximation, `relu2` the
            square of ReLU, `xielu` xIELU, whose parameters are weights of the layer.
        gated: whether the MLP multiplies the activation of one projection by another.
        parallel: whether the MLP reads the layer's input, like attention, instead of attention's
            result.
        attention_scale: factor on the product of query and key.
        attention_softcap: c of `c * tanh(score / c)`; None leaves scores as they are.
        logit_softcap: the same for the logits.
        heads_normed: whether the norms of queries and keys, if there are any, come before or after
            their rotation.
        query_scale: factor on the queries that grows with the position, or None.
        heads_gated: whether the sigmoid of a gate multiplies the output of the heads.
        experts: the mixture of experts of the layers that have one, or None.
        per_layer_width: width of what each layer reads from the tokens themselves, an embedding of
            its own; 0 without it.
    """

    norm: Literal["rms", "layer"]
    norm_epsilon: float
    activation: Activation
    gated: bool
    parallel: bool
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    heads_normed: Literal["before", "after"] = "before"
    query_scale: QueryScale | None = None
    heads_gated: bool = False
    experts: Experts | None = None
    per_layer_width: int = 0

    @property
    def reads_positions(self) -> bool:
        """Whether layers use positions for more than rotation."""
        return self.heads_normed == "after" or self.query_scale is not None


@dataclass(frozen=True)
class Attention:
    """Which other tokens a layer attends to.

    Attributes:
        rope: index of its rotary table; None if queries and keys are not rotated.
        window: number of tokens it sees, including its own; None for all.
        kv_heads: key/value heads of this layer; None takes those of the model.
        head_dim: width of its heads; None takes that of the model.
        source: the layer whose K/V a `shared_attention` reads.
    """

    rope: int | None
    window: int | None
    kv_heads: int | None = None
    head_dim: int | None = None
    source: int | None = None
