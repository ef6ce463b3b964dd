"""What the decoder layers of a model compute, beside their sizes and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class Block:
    """What all layers have in common; the weights determine where a layer has a norm or a bias.

    Attributes:
        norm: RMSNorm, or LayerNorm, which subtracts the mean.
        norm_epsilon: of every norm.
        activation: of the MLP; `gelu_tanh` is GELU in its tanh approximation.
        gated: the MLP multiplies the activation of one projection with another.
        parallel: the MLP reads the layer's input, like attention, instead of attention's result.
        attention_scale: factor on the product of query and key.
        attention_softcap: c of `c * tanh(score / c)`; None leaves scores as they are.
        logit_softcap: likewise for the logits.
    """

    norm: Literal["rms", "layer"]
    norm_epsilon: float
    activation: Activation
    gated: bool
    parallel: bool
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None


@dataclass(frozen=True)
class Attention:
    """Which other tokens a layer attends to.

    Attributes:
        rope: index of its rotary table; None if queries and keys are not rotated.
        window: number of tokens it sees, including its own; None for all.
    """

    rope: int | None
    window: int | None
