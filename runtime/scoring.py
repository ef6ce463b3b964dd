"""The scorer at work: decisions for a segment of layers, made before its input exists."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from dash_onnx.actions import SKIP, Action
from dash_onnx.budget import scorer_facts
from dash_onnx.runtime.buffers import Buffer, bind_input, bind_output
from dash_onnx.runtime.sessions import Sessions

_NEVER = 1e30  # penalty of an action that must not be chosen


class Scoring:
    """The decisions of one token, segment after segment of layers.

    Attributes:
        actions: what the decisions mean.
        decisions: action index of each layer; those of the first segment hold for every token.
        looks: per layer, the call that decides for the segment that begins after it, or None. It
            needs the decision of that layer and its input, not its output.
    """

    def __init__(self, sessions: Sessions, hidden: tuple[Buffer, Buffer]):
        """Binds the scorer once per segment.

        Args:
            sessions: of the bundle.
            hidden: the two buffers that hold the input of even and odd layers.

        Raises:
            PolicyError: the bundle has no scorer.
        """
        manifest = sessions.manifest
        facts = scorer_facts(manifest)
        layers, self.actions = manifest.model.num_layers, facts.actions
        device, count = sessions.device, len(self.actions)
        self._costs = np.array(manifest.costs.in_units(self.actions), np.float32)
        self._segments = facts.segments(layers)
        width = count * facts.longest(layers)
        self._price = 0.0
        self._log_price = Buffer((1, 1), "float32", device)
        self._row = Buffer((1,), "int64", device)
        self._penalties = [Buffer((1, width), "float32", device) for _ in self._segments]
        self._totals = [Buffer((1, width), "float32") for _ in self._segments]
        indices = [Buffer((1,), "int64", device) for _ in self._segments]
        self.decisions = [0] * layers
        self.looks: list[Callable[[], None] | None] = [None] * layers
        self._runs: list[Callable[[], object]] = []
        ports, session = sessions.scorer_ports, sessions.scorer()
        for number, (start, _) in enumerate(self._segments):
            binding = session.io_binding()
            indices[number].write(number)
            seen = hidden[max(start - 1, 0) % 2]
            inputs = [
                seen,
                indices[number],
                self._row,
                self._log_price,
                self._penalties[number],
            ]
            for port, buffer in zip(ports.inputs, inputs, strict=True):
                shape = tuple(size for size in port.shape if isinstance(size, int))
                bind_input(binding, port, buffer, shape)
            bind_output(binding, ports.outputs[0], self._totals[number])
            self._runs.append(partial(session.run_with_iobinding, binding))
            if number:
                self.looks[start - 1] = partial(self._decide, number)
        self._keep = hidden, indices  # bindings hold raw addresses

    def _decide(self, number: int) -> None:
        start, stop = self._segments[number]
        self._row.write(number * (len(self.actions) + 1) + self.decisions[max(start - 1, 0)])
        self._runs[number]()
        self.decisions[start:stop] = self._table(self._totals, number).argmin(1).tolist()

    def _table(self, buffers: list[Buffer], number: int) -> np.ndarray:
        start, stop = self._segments[number]
        return buffers[number].array.reshape(-1, len(self.actions))[: stop - start]

    @property
    def values(self) -> np.ndarray:
        """Predicted KL of every action of the last token, `[L, A]` nats."""
        numbers = range(len(self._segments))
        totals, penalties = (
            np.concatenate([self._table(buffers, number) for number in numbers])
            for buffers in (self._totals, self._penalties)
        )
        return np.where(penalties < _NEVER, totals - penalties, 0.0)

    def set_price(self, price: float) -> None:
        """Sets nats per `Costs.unit_ms`, and decides for the first segment."""
        if price == self._price:
            return
        self._price = price
        self._log_price.write(np.log(np.float32(price)))
        penalties = np.float32(price) * self._costs
        if SKIP in self.actions:
            penalties[0, self.actions.index(SKIP)] = _NEVER
        for (start, stop), buffer in zip(self._segments, self._penalties, strict=True):
            flat = np.zeros_like(buffer.array)
            flat[0, : (stop - start) * len(self.actions)] = penalties[start:stop].ravel()
            buffer.write(flat)
        self._decide(0)

    def path(self) -> tuple[Action, ...]:
        """The decisions by name."""
        return tuple(self.actions[index] for index in self.decisions)
