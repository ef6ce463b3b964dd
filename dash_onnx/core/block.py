"""What the decoder layers of a model compute, beside their sizes and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "xielu"]

AttentionForms = Literal["grouped", "both"]
"""GroupQueryAttention alone, or also plain operators, between which the runtime chooses."""

Mixer = Literal["attention", "shared_attention", "short_conv", "gated_delta"]
"""What lets the tokens of a layer see each other: attention, whose K/V grow with the text, or over
the K/V of an earlier layer; or what keeps a state of fixed size: a short convolution, or Gated
DeltaNet."""

ATTENTIONS: tuple[Mixer, ...] = ("attention", "shared_attention")
"""Those that attend."""


@dataclass(frozen=True)
class Recurrence:
    """Sizes of the layers that keep a state of fixed size, all alike.

    Attributes:
        kernel: tokens that their convolution sees, the new one included.
        channels: of the convolution.
        key_heads: of queries and keys of Gated DeltaNet; 0 without it, like those that follow.
        value_heads: of its values, each with a state `[key_dim, value_dim]`.
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
        """Of all queries of a token, and of all its keys."""
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        """Of all values of a token."""
        return self.value_heads * self.value_dim


@dataclass(frozen=True)
class QueryScale:
    """Factor on the queries at position p: `1 + beta * ln(1 + floor(p / length))`.

    Attributes:
        beta: 0 would leave them as they are.
        length: tokens, below which the factor is 1.
    """

    beta: float
    length: int


@dataclass(frozen=True)
class Experts:
    """What the layers with a mixture of experts have in common; the other layers have one MLP.

    Attributes:
        count: experts of a layer.
        per_token: experts that compute for a token: those with the highest scores of the router.
        width: inside an expert.
        shared_width: inside the MLP that computes for every token beside them, or 0.
        normalized: whether the weights of a token's experts sum to 1; else each stays as it is
            among those of all experts.
        scoring: what makes weights of the router's scores.
        factor: on what all experts of a token add.
        gate_slope: a of the experts' activation `gate * sigmoid(a * gate) * (up + b)`.
        up_offset: b.
        limit: up to which the activation takes gates, and of ups the absolute value; or None.
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
        norm_epsilon: of every norm.
        activation: of the MLP; `gelu_tanh` is GELU in its tanh approximation, `relu2` the square of
            ReLU, `xielu` xIELU, whose parameters are weights of the layer.
        gated: the MLP multiplies the activation of one projection with another.
        parallel: the MLP reads the layer's input, like attention, instead of attention's result.
        attention_scale: factor on the product of query and key.
        attention_softcap: c of `c * tanh(score / c)`; None leaves scores as they are.
        logit_softcap: likewise for the logits.
        heads_normed: whether the norms of queries and keys, where there are some, come before their
            rotation or after it.
        query_scale: factor on the queries that grows with the position, or None.
        heads_gated: whether the sigmoid of a gate multiplies what the heads return.
        experts: of the layers that have some, or None.
        per_layer_width: of what each layer reads of the tokens themselves, an embedding of its
            own; 0 without.
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
        """Whether layers use positions otherwise than to rotate."""
        return self.heads_normed == "after" or self.query_scale is not None


@dataclass(frozen=True)
class Attention:
    """Which other tokens a layer attends to.

    Attributes:
        rope: index of its rotary table; None if queries and keys are not rotated.
        window: number of tokens it sees, including its own; None for all.
        kv_heads: key/value heads of this layer; None takes those of the model.
        head_dim: width of its heads, likewise.
        source: the layer whose K/V a `shared_attention` reads.
    """

    rope: int | None
    window: int | None
    kv_heads: int | None = None
    head_dim: int | None = None
    source: int | None = None
