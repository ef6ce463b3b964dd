"""The scorer: a tiny network that predicts, for every action of a layer, the KL it would cost."""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from pathlib import Path

import torch
from torch import nn

from dash_onnx.core.actions import Action
from dash_onnx.core.contract import Dims, scorer_path, scorer_ports
from dash_onnx.exporters.train.dequantized import Tensor
from dash_onnx.exporters.train.environment import State

_DROPOUT = 0.7  # dropout of the inputs while the scorer is fitted
_CLAMP = 8.0  # standard deviations; massive activations must not drown out the rest
_OPSET = 21  # sufficient for its operators
_WIDTH = 64  # width of the hidden layer
_EPSILON = 1e-6  # of the RMS normalisation; makes the scorer blind to the scale of its input


def decision_points_of(layers: int, count: int) -> tuple[int, ...]:
    """Layers before which the scorer runs: the first after an eighth of them, then evenly.

    The first layers reveal how hard a token is; a decision before them cannot depend on the token.
    """
    first = max(layers // 8, 1)
    count = min(count, layers - first)
    return tuple(first + number * (layers - first) // count for number in range(count))


class Scorer(nn.Module):
    """Values of the actions of every layer, from the hidden state at a few decision points.

    The layers are divided into segments. The values of the first are the same for every token;
    those of segment k follow from the input of the layer before it:

    `increments[layer] = exp(W2[layer] relu(W1 z + b1) + b2[layer])`

    with W1 `[width, D]`, b1 `[width]`, W2 `[L, A-1, width]`, b2 `[L, A-1]`, and z `[D]` that input
    normalised over its dimensions, divided by the standard deviation of each, and clamped. Actions
    are ordered most expensive first; increment k is the KL that action k costs more than action
    k-1, so values grow from 0 along that order. `scale * x` gives the same values as x: the
    normalisation removes the scale. In training mode, dropout applies to z.

    Attributes:
        decision_points: first layer of each segment except the first one.
    """

    def __init__(
        self,
        layers: int,
        hidden_size: int,
        actions: int,
        decision_points: tuple[int, ...],
    ):
        """Starts with equal increments for every token.

        Args:
            layers: number of layers L.
            hidden_size: D.
            actions: number of actions A.
            decision_points: see the class.
        """
        super().__init__()
        self.decision_points = decision_points
        self.normalise = nn.LayerNorm(hidden_size, eps=_EPSILON, bias=False)
        self.normalise.weight.requires_grad_(False)  # 1 / standard deviation
        self.reduce = nn.Linear(hidden_size, _WIDTH)
        nn.init.zeros_(self.reduce.bias)
        self.expand = nn.Parameter(torch.randn(layers, actions - 1, _WIDTH) / math.sqrt(_WIDTH))
        self.bias = nn.Parameter(torch.zeros(layers, actions - 1))
        self.eval()

    def log_increments(self, state: State) -> Tensor:
        """Log of the predicted KL in nats between adjacent actions, `[B, T, n, A-1]`."""
        bias = self.bias[state.layers]
        if state.layers.start < self.decision_points[0]:
            return bias.expand(*state.hidden.shape[:-1], -1, -1)
        inputs = self.normalise(state.hidden).clamp(-_CLAMP, _CLAMP)
        inputs = nn.functional.dropout(inputs, _DROPOUT, self.training)
        hidden = nn.functional.relu(self.reduce(inputs))
        expand = self.expand[state.layers].flatten(0, 1)
        return nn.functional.linear(hidden, expand, bias.flatten()).unflatten(-1, bias.shape)

    def values(self, state: State) -> Tensor:
        """Predicted KL of every action in nats, `[B, T, n, A]`; 0 for the most expensive."""
        return nn.functional.pad(self.log_increments(state).exp().cumsum(-1), (1, 0))

    def standardise(self, hidden: Tensor) -> None:
        """Sets the standard deviations from samples of hidden states `[n, D]`."""
        with torch.no_grad():
            normed = nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=_EPSILON)
            self.normalise.weight.copy_(1 / normed.square().mean(0).sqrt().clamp(min=1e-3))


class BundleScorer(nn.Module):
    """What the scorer graph computes: the trained scorer, extended by the highest precision.

    Training leaves `full` out if INT8 can replace it: the difference is the rounding of weights and
    activations, small and about the same for every token, so it is a constant increment per layer,
    before the trained ones.

    Attributes:
        actions: actions of the output columns.
        extra: how many of them come before those of the trained scorer (0 or 1).
        layers: number of layers L.
    """

    def __init__(
        self,
        scorer: Scorer,
        actions: tuple[Action, ...],
        extra: tuple[Action, ...],
        gain: Tensor,
    ):
        """Lays the weights out so that the graph has few operators.

        Args:
            scorer: the trained scorer.
            actions: its actions.
            extra: the highest precision, where training left it out.
            gain: nats saved by running a layer at `extra`, `[L]`.
        """
        super().__init__()
        self.scorer = scorer
        self.actions = (*extra, *actions)
        self.extra, self.layers = len(extra), len(gain)
        count, width = len(self.actions), scorer.expand.shape[-1]
        with torch.no_grad():
            self._reduce = scorer.reduce.weight.T.contiguous()  # [D, width]
            still = scorer.expand.new_zeros(len(gain), self.extra, width)
            expand = torch.cat([still, scorer.expand], 1)
            expand[: scorer.decision_points[0]] = 0  # the same for every token
            self._expand = expand.flatten(0, 1).T.contiguous()  # [width, L * (A - 1)]
            constant = gain.clamp(min=1e-9).log()[:, None].expand(-1, self.extra)
            self._bias = torch.cat([constant, scorer.bias], 1)
            # Sums the increments of a layer up to each action.
            self._sums = torch.ones(count - 1, count).triu(1)

    def values(self, state: State) -> Tensor:
        """Like `Scorer.values`, with the extra action first."""
        values = self.scorer.values(state)
        if not self.extra:
            return values
        return nn.functional.pad(values + self._bias[state.layers, :1].exp(), (1, 0))

    def forward(self, hidden: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
        """The graph, see `core.contract.scorer_ports`: `[1, D]`, `[L, A]` -> `[L, A]`, `[L]`."""
        inputs = self.scorer.normalise(hidden.float()).clamp(-_CLAMP, _CLAMP)
        reduced = nn.functional.relu(torch.addmm(self.scorer.reduce.bias, inputs, self._reduce))
        increments = torch.addmm(self._bias.flatten(), reduced, self._expand).exp()
        total = torch.addmm(penalty, increments.view(self.layers, -1), self._sums)
        return total, total.argmin(1)


def export_scorer(scorer: BundleScorer, folder: Path, dims: Dims) -> str:
    """Writes the graph to a bundle under a name derived from its content; returns the name."""
    ports = scorer_ports(dims, scorer.layers, len(scorer.actions))
    inputs = [
        torch.zeros([int(size) for size in port.shape], dtype=getattr(torch, port.dtype))
        for port in ports.inputs
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            scorer.eval(),
            tuple(inputs),
            dynamo=True,
            opset_version=_OPSET,
            input_names=[port.name for port in ports.inputs],
            output_names=[port.name for port in ports.outputs],
            verbose=False,
            external_data=False,
        )
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:  # stack traces, which contain paths of this machine
        del node.metadata_props[:]
    content = proto.SerializeToString(deterministic=True)
    name = scorer_path(hashlib.sha256(content).hexdigest())
    (folder / name).write_bytes(content)
    return name
