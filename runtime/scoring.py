"""The scorer at work: decisions for a block of layers, made before the block's input exists."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from dash_onnx.actions import SKIP, Action
from dash_onnx.budget import scorer_facts
from dash_onnx.runtime.buffers import Buffer, bind_input, bind_output
from dash_onnx.runtime.sessions import Sessions

_NEVER = 1e30  # penalty of an action that must not be chosen


class Scoring:
    """The decisions of one token, block after block of layers.

    Attributes:
        actions: what the decisions mean.
        decisions: `[L]` action indices.
        runs: per layer, the call that writes the decisions of the block that begins there, or
            None. It needs the decision of the layer before, and the hidden state that this layer
            reads (for layer 0 the one that it reads itself).
    """

    def __init__(self, sessions: Sessions, hidden: tuple[Buffer, Buffer]):
        """Binds the scorer once per block.

        Args:
            sessions: of the bundle.
            hidden: the two buffers that hold the input of even and odd layers.

        Raises:
            PolicyError: the bundle has no scorer.
        """
        manifest = sessions.manifest
        facts = scorer_facts(manifest)
        layers, self.actions = manifest.model.num_layers, facts.actions
        count, block = len(self.actions), facts.block
        padded = -(-layers // block) * block  # the last block may reach beyond the last layer
        self._costs = np.zeros((padded, count), np.float32)
        self._costs[:layers] = [
            [costs[action] for action in self.actions] for costs in manifest.costs.layers_ms
        ]
        device = sessions.device
        self._price = 0.0
        self._log_price = Buffer((1, 1), "float32", device)
        self._penalty = Buffer((padded, count), "float32", device)
        decided = Buffer((padded + 1,), "int64")
        decided.array[0] = count  # nothing precedes layer 0
        self.decisions = decided.array[1 : layers + 1]
        indices = Buffer((layers,), "int64", device)
        indices.write(np.arange(layers))
        self._values = Buffer((padded, count), "float32", device)
        self.runs: list[Callable[[], Any] | None] = [None] * layers
        ports, session = sessions.scorer_ports, sessions.scorer()
        for layer in range(0, layers, block):
            binding = session.io_binding()
            inputs = [
                (hidden[max(layer - 1, 0) % 2], 0),
                (indices, layer),
                (decided, layer),
                (self._log_price, 0),
                (self._penalty, layer * count),
            ]
            for port, (buffer, start) in zip(ports.inputs, inputs, strict=True):
                bind_input(binding, port, buffer, _size(port.shape), start)
            outputs = [(self._values, layer * count), (decided, layer + 1)]
            for port, (buffer, start) in zip(ports.outputs, outputs, strict=True):
                bind_output(binding, port, buffer, _size(port.shape), start)
            self.runs[layer] = partial(session.run_with_iobinding, binding)
        self._keep = hidden, indices, decided  # bindings hold raw addresses

    @property
    def values(self) -> np.ndarray:
        """Predicted KL of every action of the last token, `[L, A]` nats."""
        return self._values.array[: len(self.runs)]

    def set_price(self, price: float) -> None:
        """Sets nats per millisecond."""
        if price == self._price:
            return
        self._price = price
        self._log_price.write(np.log(np.float32(price)))
        penalties = np.float32(price) * self._costs
        if SKIP in self.actions:
            penalties[0, self.actions.index(SKIP)] = _NEVER
        self._penalty.write(penalties)

    def path(self) -> tuple[Action, ...]:
        """The decisions by name."""
        return tuple(self.actions[index] for index in self.decisions.tolist())


def _size(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if isinstance(size, int))
