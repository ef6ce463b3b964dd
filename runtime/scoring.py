"""The scorer at work: one decision per layer, each made before its layer's input exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dash_onnx.actions import SKIP, Action
from dash_onnx.budget import scorer_facts
from dash_onnx.runtime.buffers import Buffer, bind_input, bind_output
from dash_onnx.runtime.sessions import Sessions

_NEVER = 1e30  # penalty of an action that must not be chosen


class Scoring:
    """The decisions of one token, layer after layer.

    Attributes:
        actions: what the decisions mean.
        decisions: `[L]` action indices; `runs[i]` writes the one of layer i.
        runs: one call per layer; `runs[i]` needs the decision of layer i-1 and the hidden state
            that layer i-1 reads (for i = 0 the one that layer 0 reads).
    """

    def __init__(self, sessions: Sessions, hidden: tuple[Buffer, Buffer]):
        """Binds the scorer once per layer.

        Args:
            sessions: of the bundle.
            hidden: the two buffers that hold the input of even and odd layers.

        Raises:
            PolicyError: the bundle has no scorer.
        """
        manifest = sessions.manifest
        facts = scorer_facts(manifest)
        layers, self.actions = manifest.model.num_layers, facts.actions
        count = len(self.actions)
        self._costs = np.array(
            [[costs[action] for action in self.actions] for costs in manifest.costs.layers_ms],
            np.float32,
        )
        device = sessions.device
        self._price = 0.0
        self._log_price = Buffer((1, 1), "float32", device)
        self._penalty = [Buffer((count,), "float32", device) for _ in range(layers)]
        decided = Buffer((layers + 1,), "int64")
        decided.array[0] = count  # nothing precedes layer 0
        self._decided = decided
        self.decisions = decided.array[1:]
        self._indices = Buffer((layers,), "int64", device)
        self._indices.write(np.arange(layers))
        self._values = Buffer((layers, count), "float32", device)
        self.runs: list[Callable[[], Any]] = []
        ports, session = sessions.scorer_ports, sessions.scorer()
        for layer in range(layers):
            binding = session.io_binding()
            inputs = [
                (hidden[max(layer - 1, 0) % 2], 0),
                (self._indices, layer),
                (decided, layer),
                (self._log_price, 0),
                (self._penalty[layer], 0),
            ]
            for port, (buffer, start) in zip(ports.inputs, inputs, strict=True):
                bind_input(binding, port, buffer, _size(port.shape), start)
            outputs = [(self._values, layer * count), (decided, layer + 1)]
            for port, (buffer, start) in zip(ports.outputs, outputs, strict=True):
                bind_output(binding, port, buffer, _size(port.shape), start)
            self.runs.append(_Run(session.run_with_iobinding, binding))
        self._keep = hidden

    @property
    def values(self) -> np.ndarray:
        """Predicted KL of every action of the last token, `[L, A]` nats."""
        return self._values.array

    def set_price(self, price: float) -> None:
        """Sets nats per millisecond."""
        if price == self._price:
            return
        self._price = price
        self._log_price.write(np.log(np.float32(price)))
        penalties = np.float32(price) * self._costs
        if SKIP in self.actions:
            penalties[0, self.actions.index(SKIP)] = _NEVER
        for buffer, row in zip(self._penalty, penalties, strict=True):
            buffer.write(row)

    def path(self) -> tuple[Action, ...]:
        """The decisions by name."""
        return tuple(self.actions[index] for index in self.decisions.tolist())


class _Run:
    """A call without arguments."""

    __slots__ = ("_binding", "_call")

    def __init__(self, call: Callable[[Any], Any], binding: Any):
        self._call = call
        self._binding = binding

    def __call__(self) -> None:
        self._call(self._binding)


def _size(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if isinstance(size, int))
