"""The layer description that every family maps its weights to, and every graph is built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PretrainedConfig

from dash_onnx.errors import SourceError
from dash_onnx.exporters.quantize import Bits, Quantized, concatenate
from dash_onnx.exporters.sources import Weights
from dash_onnx.manifest import ModelFacts, Rope


@dataclass(frozen=True)
class Linear:
    """y = x @ weight.T + bias.

    Attributes:
        name: name for messages and initializers.
        weight: `[N, K]`, any float dtype.
        bias: `[N]` or None.
        packed: the weight as its source stores it, where that is a form the graphs can hold.
    """

    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    packed: Quantized | None = None

    def stored(self, bits: Bits, block_size: int) -> Quantized | None:
        """The source's own integers, if they have this many bits and these blocks."""
        packed = self.packed
        fits = packed and (packed.bits, packed.block_size) == (bits, block_size)
        return packed if fits else None

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.shape[1]

    def rows(self, start: int, stop: int, name: str) -> Linear:
        """A part of the outputs."""
        bias = None if self.bias is None else self.bias[start:stop]
        return Linear(name, self.weight[start:stop], bias)


def stack(name: str, *parts: Linear) -> Linear:
    """One matrix product for several that read the same input: fewer kernel launches."""
    weight = torch.cat([part.weight for part in parts])
    packed = _same_form([part.packed for part in parts])
    if all(part.bias is None for part in parts):
        return Linear(name, weight, None, packed)
    zeros = [weight.new_zeros(part.out_features) for part in parts]
    biases = [z if p.bias is None else p.bias for p, z in zip(parts, zeros, strict=True)]
    return Linear(name, weight, torch.cat(biases), packed)


def _same_form(parts: Sequence[Quantized | None]) -> Quantized | None:
    """Stacked integers where every part has them in the same form."""
    known = [part for part in parts if part is not None]
    forms = {(part.bits, part.block_size, part.offsets is None) for part in known}
    return concatenate(known) if len(known) == len(parts) and len(forms) == 1 else None


@dataclass(frozen=True)
class Layer:
    """Weights of one pre-norm decoder layer with gated MLP.

    Attributes:
        input_norm: `[D]` RMSNorm weight before attention.
        qkv: stacked query, key and value projections, `[(H + 2 * H_kv) * d, D]`.
        output: attention output projection, `[D, H * d]`.
        post_norm: `[D]` RMSNorm weight before the MLP.
        gate_up: stacked gate and up projections, `[2 * I, D]`.
        down: `[D, I]`.
    """

    input_norm: torch.Tensor
    qkv: Linear
    output: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Head:
    """Final norm `[D]` and LM head `[V, D]`."""

    norm: torch.Tensor
    linear: Linear


@dataclass(frozen=True)
class ModelSpec:
    """A model as the graphs need it, without weights.

    Attributes:
        facts: sizes.
        rope: rotary position embedding.
        norm_epsilon: of every RMSNorm.
    """

    facts: ModelFacts
    rope: Rope
    norm_epsilon: float


def take(weights: Weights, name: str, *shape: int) -> torch.Tensor:
    """Reads a weight and checks it.

    Raises:
        SourceError: missing, of another shape than the config says, or not finite.
    """
    tensor = weights[name]
    if tuple(tensor.shape) != shape:
        raise SourceError(
            f"{name} has shape {tuple(tensor.shape)}, the config asks for {shape}: "
            "config.json and weights do not belong together"
        )
    if not torch.isfinite(tensor).all():
        raise SourceError(f"{name} has values that are not finite: the weights are damaged")
    return tensor


class Architecture(Protocol):
    """One model family."""

    def describe(self, name: str, config: PretrainedConfig, max_length: int | None) -> ModelSpec:
        """Maps the config.

        Raises:
            UnsupportedError: the config asks for something the graphs do not have.
        """
        ...

    def embedding(self, weights: Weights, spec: ModelSpec) -> torch.Tensor:
        """Token embedding `[V, D]`."""
        ...

    def layer(self, weights: Weights, index: int, spec: ModelSpec) -> Layer:
        """Weights of one decoder layer."""
        ...

    def head(self, weights: Weights, spec: ModelSpec, config: PretrainedConfig) -> Head:
        """Final norm and LM head; the head may be the embedding (tied)."""
        ...
