"""The layer description that every family maps its weights to, and every graph is built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dash_onnx.core.block import ATTENTIONS, Attention, Block, Mixer, Recurrence
from dash_onnx.core.contract import Dims, Ports, layer_ports
from dash_onnx.core.errors import SourceError
from dash_onnx.core.facts import ModelFacts, Rope, Target
from dash_onnx.exporters.quantize.blockwise import Bits, Matrix, Quantized, concatenate
from dash_onnx.exporters.quantize.ternary import ternary
from dash_onnx.exporters.sources import Weights

F = torch.nn.functional


@dataclass(frozen=True)
class Linear:
    """y = x @ weight.T + bias.

    Attributes:
        name: name for messages and initializers.
        weight: `[N, K]`, any float dtype.
        bias: `[N]` or None.
        packed: the weight as its source stores it, if the graphs can hold that form.
    """

    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    packed: Quantized | None = None

    def stored(self, bits: Bits, block_size: int) -> Quantized | None:
        """The weight without rounding, if this bit width and block size can hold it.

        It consists of the source's own integers, or is ternary.
        """
        packed = self.packed
        if packed and (packed.bits, packed.block_size) == (bits, block_size):
            return packed
        return ternary(self.weight, bits, block_size)

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.shape[1]

    def rows(self, start: int, stop: int, name: str) -> Linear:
        """A slice of the outputs."""
        bias = None if self.bias is None else self.bias[start:stop]
        return Linear(name, self.weight[start:stop], bias)

    def columns(self, which: npt.NDArray[np.int64], name: str) -> Linear:
        """The share of the outputs that comes from some of the inputs, without the bias."""
        return Linear(name, self.weight[:, torch.from_numpy(which)])

    def reordered(self, order: npt.NDArray[np.int64]) -> Linear:
        """The same outputs in another order, given as indices into the current one."""
        bias = None if self.bias is None else self.bias[order]
        packed = self.packed and self.packed.map(lambda array: array[order])
        return Linear(self.name, self.weight[order], bias, packed)


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
    """The stacked integers, if every part has them in the same form."""
    known = [part for part in parts if part is not None]
    forms = {(part.bits, part.block_size, part.offsets is None) for part in known}
    if len(known) < len(parts) or len(forms) > 1:
        return None
    return concatenate(known, sum(part.shape[0] for part in known))


@dataclass(frozen=True)
class Norm:
    """Weight and bias of a norm, `[n]`; it works on groups of n features of its input."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def scaled(self, factor: float) -> Norm:
        """The same norm with its result multiplied by a factor."""
        bias = None if self.bias is None else self.bias.float() * factor
        return Norm(self.weight.float() * factor, bias)

    def reordered(self, order: npt.NDArray[np.int64] | None) -> Norm:
        """The same norm for reordered features, given as indices into those of each head."""
        if order is None:
            return self
        parts = (self.weight, self.bias)
        heads = [None if x is None else x.unflatten(0, (-1, len(order))) for x in parts]
        weight, bias = (None if x is None else x[:, order].flatten() for x in heads)
        assert weight is not None
        return Norm(weight, bias)

    def __call__(self, x: torch.Tensor, block: Block) -> torch.Tensor:
        """`[..., k * n]` -> the same shape, float32."""
        size = self.weight.shape[0]
        groups = x.float().unflatten(-1, (-1, size))
        weight = self.weight.to(groups)
        if block.norm == "rms":
            result = F.rms_norm(groups, (size,), weight, block.norm_epsilon)
        else:
            bias = None if self.bias is None else self.bias.to(groups)
            result = F.layer_norm(groups, (size,), weight, bias, block.norm_epsilon)
        return result.flatten(-2)


@dataclass(frozen=True)
class Conv:
    """A causal depthwise convolution.

    Attributes:
        weight: `[channels, kernel]`; the last column is that of the new token.
        bias: `[channels]` or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Delta:
    """Weights specific to a Gated DeltaNet, which has H value heads.

    Attributes:
        gates: stacked projections of decay and update rate, `[2 * H, D]`.
        decay: factor on the softplus of the decay, `[H]`, negative.
        decay_bias: added before the softplus, `[H]`.
        norm: norm of each head's result, `[value_dim]`.
    """

    gates: Linear
    decay: torch.Tensor
    decay_bias: torch.Tensor
    norm: Norm


@dataclass(frozen=True)
class Mixture:
    """The experts of a layer; E is their number, I the width inside one.

    Attributes:
        router: projection to the scores of the experts, `[E, D]`.
        up: stacked gate and up projections of all experts, gate and up rows alternating,
            `[E * 2 * I, D]`.
        down: stacked, `[E * D, I]`.
        shared_gate: `[1, D]`; its sigmoid multiplies what the layer's own MLP adds.
        choice_bias: `[E]`, added to the experts' weights only when choosing experts.
    """

    router: Linear
    up: Linear
    down: Linear
    shared_gate: Linear | None = None
    choice_bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer; a norm that is None does not exist.

    Attributes:
        input_norm: `[D]`, before attention.
        qkv: stacked query, key and value projections, `[(H + 2 * H_kv) * d, D]`. For a short
            convolution: both factors of its input and the one on its result, `[3 * D, D]`. For a
            Gated DeltaNet: the input of its convolution, and the gate of its result. Where
            attention is gated, the gates of all heads come last.
        q_norm, k_norm: norms of queries and keys: `[d]` for each head separately, or one over all
            heads together. See `Block` for their place relative to the rotation.
        output_sub_norm: `[H * d]`, of the input of `output`.
        output: attention output projection, `[D, H * d]`.
        output_norm: `[D]`, of what attention adds to the residual stream.
        post_norm: `[D]`, before the MLP. A parallel MLP without one shares attention's input.
        gate_up: stacked gate and up projections, `[2 * I, D]`; `[I, D]` without a gate.
            None, like `down`, where the layer has only experts.
        down_sub_norm: `[I]`, of the input of `down`.
        down: `[D, I]`.
        down_norm: `[D]`, of what the MLP adds to the residual stream.
        sinks: `[H]`, a score for each head that takes part in the softmax but has no value.
        conv: convolution of a layer without attention.
        delta: weights of a Gated DeltaNet.
        mixture: the experts, which run alongside the MLP or replace it.
        xielu: `[3]`, where the activation is xIELU: f of `f_0 x + f_1 relu(x)^2 + f_2 elu(x)`.
        v_norm: `[d]`, of each head's values.
        per_layer_gate: `[P, D]`, from the layer's result to the gate on its token embedding.
        per_layer_output: `[D, P]`, projects the gated embedding to the residual stream.
        per_layer_norm: `[D]`, of what is added.
        factor: `[1]`, multiplies the whole result.
    """

    input_norm: Norm | None
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    output: Linear
    output_norm: Norm | None
    post_norm: Norm | None
    gate_up: Linear | None
    down: Linear | None
    down_norm: Norm | None
    output_sub_norm: Norm | None = None
    down_sub_norm: Norm | None = None
    sinks: torch.Tensor | None = None
    xielu: torch.Tensor | None = None
    conv: Conv | None = None
    delta: Delta | None = None
    mixture: Mixture | None = None
    v_norm: Norm | None = None
    per_layer_gate: Linear | None = None
    per_layer_output: Linear | None = None
    per_layer_norm: Norm | None = None
    factor: torch.Tensor | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All matrix products whose precision varies between variants."""
        mixture = self.mixture
        experts = () if mixture is None else (mixture.up, mixture.down)
        ends = (self.per_layer_gate, self.per_layer_output)
        products = (self.qkv, self.output, self.gate_up, self.down, *experts, *ends)
        return tuple(linear for linear in products if linear is not None)


@dataclass(frozen=True)
class PerLayer:
    """Embeddings of the tokens for each layer, of width P.

    Attributes:
        table: `[V, L * P]`, which stays on disk; a few rows are read at a time.
        scale: factor on its rows.
        projection: of the token embedding that the first layer reads, `[L * P, D]`, added to them.
        norm: `[P]`, of the result of that projection for each layer.
    """

    table: Matrix
    scale: float
    projection: Linear
    norm: Norm


@dataclass(frozen=True)
class Head:
    """Final norm `[D]`, its result divided by the logits' softcap, and LM head `[V, D]`."""

    norm: Norm
    linear: Linear


@dataclass(frozen=True)
class Scales:
    """Factors that cost nothing: they are folded into norms and the embedding.

    Attributes:
        embedding: on the token embedding.
        stream: hidden states in transformers, as a multiple of those in the graphs.
        residual: on what attention and MLP add to the residual stream; folded into their norms.
        logit: on the logits, before their softcap.
    """

    embedding: float = 1.0
    stream: float = 1.0
    residual: float = 1.0
    logit: float = 1.0


@dataclass(frozen=True)
class ModelSpec:
    """A model as the graphs need it, without weights.

    Attributes:
        facts: sizes.
        block: what all layers compute.
        ropes: rotary position embeddings; most models have one.
        attention: of each layer.
        scales: factors of the model.
        embedding_normed: whether the first layer reads token embeddings through a norm, which has
            no weights.
        mixers: see `Manifest`.
        recurrence: see `Manifest`.
    """

    facts: ModelFacts
    block: Block
    ropes: tuple[Rope, ...]
    attention: tuple[Attention, ...]
    scales: Scales = Scales()
    embedding_normed: bool = False
    mixers: tuple[Mixer, ...] = ()
    recurrence: Recurrence | None = None

    def dims(self, target: Target, layer: int | None = None) -> Dims:
        """Dimensions that the ports of the model's graphs, or of one layer's graphs, depend on."""
        attention = None if layer is None else self.attention[layer]
        width = self.block.per_layer_width
        return Dims.of(self.facts, self.ropes, target, self.recurrence, width, attention)

    def layer_ports(self, target: Target, layer: int) -> Ports:
        """The ports of a layer's graphs."""
        return layer_ports(self.dims(target, layer), self.mixer_of(layer))

    def attends(self, layer: int) -> bool:
        """Whether the layer has attention, of either kind."""
        return self.mixer_of(layer) in ATTENTIONS

    def heads_of(self, layer: int) -> tuple[int, int]:
        """See `ModelFacts`."""
        return self.facts.heads_of(self.attention[layer])

    def mixer_of(self, layer: int) -> Mixer:
        """What mixes the tokens in a layer."""
        return self.mixers[layer] if self.mixers else "attention"


def take(weights: Weights, name: str, *shape: int) -> torch.Tensor:
    """Reads a weight and checks it.

    Raises:
        SourceError: the weight is missing, damaged, or not of the shape that the config implies.
    """
    tensor = weights[name]
    check_shape(name, tuple(tensor.shape), shape)
    if not tensor.is_floating_point():
        raise SourceError(f"{name} holds {tensor.dtype}: quantized in a way that is not known")
    return tensor


def check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Refuses a weight whose shape differs from the one that the config implies.

    Raises:
        SourceError: the shapes differ.
    """
    if found != wanted:
        raise SourceError(
            f"{name} has shape {found}, the config asks for {wanted}: "
            "config.json and weights do not belong together"
        )
