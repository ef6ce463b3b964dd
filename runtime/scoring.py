"""The scorer at work: decisions for a segment of layers, made before its input exists."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dash_onnx.actions import SKIP, Action
from dash_onnx.budget import scorer_facts
from dash_onnx.runtime.buffers import Buffer, bound_run
from dash_onnx.runtime.ort import Device
from dash_onnx.runtime.sessions import Sessions
from dash_onnx.runtime.streams import Handover

_NEVER = 1e30  # penalty of an action that must not be chosen


class Scoring:
    """The decisions of one token, segment after segment of layers.

    Attributes:
        actions: what the decisions mean.
        decisions: action index of each layer; those of the first segment hold for every token.
        looks: per layer, the segment that begins after it, or None. It is decided while that layer
            runs: `begin` before the layer is called, `finish` afterwards.
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
        self._price = 0.0
        self._log_price = Buffer((1, 1), "float32", device)
        self._penalty = Buffer((layers, count), "float32", device)
        self._totals: list[Buffer] = []
        self._results: list[Handover] = []
        self.decisions = [0] * layers
        self.looks: list[int | None] = [None] * layers
        self._runs: list[list[Callable[[], object]]] = []  # by the action before the segment
        for number, (start, _) in enumerate(self._segments):
            total = Buffer((layers, count), "float32", device)
            action = Buffer((layers,), "int64", device)
            self._totals.append(total)
            self._results.append(sessions.streams.handover(action))
            shared = self._log_price, self._penalty
            rows = [number * (count + 1) + previous for previous in range(count if number else 1)]
            self._runs.append(
                [
                    bound_run(
                        sessions.scorer(),
                        sessions.scorer_ports,
                        [hidden[max(start - 1, 0) % 2], _index(row, device), *shared],
                        [total, action],
                        sessions.streams.run_options,
                    )
                    for row in rows
                ]
            )
            if number:
                self.looks[start - 1] = number

    def begin(self, number: int) -> None:
        """Starts to decide for a segment: once the layer before it is decided and has its input."""
        start, _ = self._segments[number]
        results = self._results[number]
        results.offer()
        self._runs[number][self.decisions[start - 1] if number else 0]()
        results.fetch()

    def finish(self, number: int) -> None:
        """Takes the decisions."""
        start, stop = self._segments[number]
        self.decisions[start:stop] = self._results[number].wait()[start:stop].tolist()

    @property
    def values(self) -> np.ndarray:
        """Predicted KL of every action of the last token, `[L, A]` nats."""
        totals = [
            total.array[start:stop]
            for total, (start, stop) in zip(self._totals, self._segments, strict=True)
        ]
        penalty = self._penalty.array
        return np.where(penalty < _NEVER, np.concatenate(totals) - penalty, 0.0)

    def set_price(self, price: float) -> None:
        """Sets nats per `Costs.unit_ms`, and decides for the first segment."""
        if price == self._price:
            return
        self._price = price
        self._log_price.write(np.log(np.float32(price)))
        penalty = np.float32(price) * self._costs
        if SKIP in self.actions:
            penalty[0, self.actions.index(SKIP)] = _NEVER
        self._penalty.write(penalty)
        self.begin(0)
        self.finish(0)

    def path(self) -> tuple[Action, ...]:
        """The decisions by name."""
        return tuple(map(self.actions.__getitem__, self.decisions))


def _index(value: int, device: Device) -> Buffer:
    buffer = Buffer((1,), "int64", device)
    buffer.write(value)
    return buffer
