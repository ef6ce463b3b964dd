"""The scorer: a tiny network that predicts, for every action of a layer, the KL it would cost."""

from __future__ import annotations

import hashlib
import math
import warnings
from pathlib import Path

import torch
from torch import nn

from dash_onnx.actions import SKIP, Action
from dash_onnx.contract import Dims, scorer_path, scorer_ports
from dash_onnx.exporters.train.environment import Decide, State
from dash_onnx.exporters.train.frozen import Tensor

_CLAMP = 8.0  # standard deviations; massive activations must not drown the rest
_FLOOR = -12.0  # log nats: a KL of 6e-6 is as good as none
_CEILING = 3.0
_OPSET = 21  # none of its operators is newer
_EPSILON = 1e-6  # of the RMS normalisation; makes the scorer blind to the scale of its input


class Scorer(nn.Module):
    """Values of the actions of one layer, from the input of the layer before.

    `steps = exp(W2[layer] silu(W1 z + E[layer] + P[previous] + s * log price) + b[layer])`, where
    z is the RMS-normalised input, divided by its standard deviation and clamped. Actions are
    ordered from dear to cheap; step k is what action k costs more than action k-1, so values
    grow from 0 along that order. `scale * x` gives the same values as x: the normalisation takes
    the scale away.
    """

    inverse_std: Tensor

    def __init__(self, layers: int, hidden_size: int, actions: int, width: int = 64):
        """Starts with the same steps for every token.

        Args:
            layers: number of layers.
            hidden_size: D.
            actions: A.
            width: of the hidden layer.
        """
        super().__init__()
        self.register_buffer("inverse_std", torch.ones(hidden_size))
        self.reduce = nn.Linear(hidden_size, width, bias=False)
        self.layer_bias = nn.Parameter(torch.zeros(layers, width))
        self.previous_bias = nn.Parameter(torch.zeros(actions + 1, width))
        self.price_slope = nn.Parameter(torch.zeros(width))
        self.expand = nn.Parameter(torch.randn(layers, width, actions - 1) / math.sqrt(width))
        self.bias = nn.Parameter(torch.zeros(layers, actions - 1))

    def features(self, hidden: Tensor) -> Tensor:
        """`[..., D]` -> what the first product reads."""
        normed = nn.functional.rms_norm(hidden, (hidden.shape[-1],), self.inverse_std, _EPSILON)
        return normed.clamp(-_CLAMP, _CLAMP)

    def log_steps(self, state: State, log_price: Tensor) -> Tensor:
        """Log of the predicted KL in nats between neighbouring actions, `[B, T, A-1]`.

        Args:
            state: of the decision.
            log_price: log of nats per millisecond, broadcastable to `[B, T]`.
        """
        bias = self.layer_bias[state.layer] + self.previous_bias[state.previous]
        slope = log_price[..., None] * self.price_slope
        hidden = nn.functional.silu(self.reduce(self.features(state.hidden)) + bias + slope)
        steps = (hidden.unsqueeze(-2) @ self.expand[state.layer]).squeeze(-2)
        return (steps + self.bias[state.layer]).clamp(_FLOOR, _CEILING)

    def values(self, state: State, log_price: Tensor) -> Tensor:
        """Predicted KL of every action in nats, `[B, T, A]`; 0 for the dearest."""
        steps = self.log_steps(state, log_price).exp()
        return nn.functional.pad(steps.cumsum(-1), (1, 0))

    def calibrate(self, hidden: Tensor) -> None:
        """Sets the standard deviations from samples of hidden states `[n, D]`."""
        self.inverse_std.fill_(1.0)
        normed = nn.functional.rms_norm(hidden, (hidden.shape[-1],), None, _EPSILON)
        self.inverse_std.copy_(1 / normed.square().mean(0).sqrt().clamp(min=1e-3))


def greedy(scorer: Scorer, costs: Tensor, log_price: Tensor) -> Decide:
    """Decisions as the runtime takes them: argmin of value + price * cost.

    Args:
        scorer: trained.
        costs: milliseconds `[L, A]`, infinite where an action must not be taken.
        log_price: broadcastable to `[B, T]`.
    """

    def decide(state: State) -> Tensor:
        with torch.no_grad():
            values = scorer.values(state, log_price)
            total = values + log_price.exp()[..., None] * costs[state.layer]
            return nn.functional.one_hot(total.argmin(-1), total.shape[-1]).float()

    return decide


class BundleScorer(nn.Module):
    """What `scorer.onnx` computes: the trained scorer, extended by the highest precision.

    The process leaves `full` out where INT8 stands for it: the difference is the rounding of the
    weights and activations, small and much the same for every token, so it is a constant per
    layer that every other action has to pay.

    Attributes:
        actions: what the outputs mean.
        extra: how many of them come before those of the trained scorer (0 or 1).
        forbidden: `[L, A]`, infinity where layer 0 would be skipped.
    """

    gain: Tensor
    forbidden: Tensor

    def __init__(
        self,
        scorer: Scorer,
        actions: tuple[Action, ...],
        extra: tuple[Action, ...],
        gain: Tensor,
        log_price_range: tuple[float, float],
    ):
        """Combines them.

        Args:
            scorer: trained.
            actions: of the trained scorer.
            extra: the highest precision, where the process left it out.
            gain: `[L]` nats that running a layer at it saves.
            log_price_range: prices that training has seen; beyond them it is clamped.
        """
        super().__init__()
        self.scorer = scorer
        self.actions = (*extra, *actions)
        self.extra = len(extra)
        self._range = log_price_range
        self.register_buffer("gain", gain)
        forbidden = torch.zeros(len(gain), len(self.actions))
        if SKIP in self.actions:
            forbidden[0, self.actions.index(SKIP)] = math.inf
        self.register_buffer("forbidden", forbidden)

    def values(self, state: State, log_price: Tensor) -> Tensor:
        """Predicted KL of every action in nats, `[..., A]`."""
        values = self.scorer.values(state, log_price.clamp(*self._range))
        if self.extra:
            dearer = values + self.gain[state.layer][..., None]
            values = torch.cat([values[..., :1], dearer], -1)
        return values

    def decide(self, state: State, log_price: Tensor, penalty: Tensor) -> Tensor:
        """Index of the action with the least sum of value and penalty, `[...]`."""
        return (self.values(state, log_price) + penalty).argmin(-1)

    def forward(
        self, hidden: Tensor, layer: Tensor, previous: Tensor, log_price: Tensor, penalty: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The graph; see `dash_onnx.contract.scorer_ports`."""
        known = (previous - self.extra).clamp(min=0)
        state = State(layer, hidden[0].float(), known)  # type: ignore[arg-type]
        values = self.values(state, log_price)
        return values[0], (values + penalty).argmin(-1)


def export_scorer(scorer: BundleScorer, folder: Path, dims: Dims) -> str:
    """Writes the graph into a bundle; returns its name there."""
    ports = scorer_ports(dims, len(scorer.actions))
    kinds = {"float32": torch.float32, "float16": torch.float16, "int64": torch.int64}
    inputs = tuple(
        torch.zeros([int(size) for size in port.shape], dtype=kinds[port.dtype])
        for port in ports.inputs
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            scorer.eval(),
            inputs,
            dynamo=True,
            opset_version=_OPSET,
            input_names=[port.name for port in ports.inputs],
            output_names=[port.name for port in ports.outputs],
            verbose=False,
            external_data=False,
        )
    assert program is not None
    content = program.model_proto.SerializeToString(deterministic=True)
    name = scorer_path(hashlib.sha256(content).hexdigest())
    (folder / name).write_bytes(content)
    return name
