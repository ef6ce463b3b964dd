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
        width = count * facts.longest(layers)
        self._price = 0.0
        self._log_price = Buffer((1, 1), "float32", device)
        self._penalties = [Buffer((1, width), "float32", device) for _ in self._segments]
        self._results: list[Handover] = []
        self.decisions = [0] * layers
        self.looks: list[int | None] = [None] * layers
        self._runs: list[list[Callable[[], object]]] = []  # by the action before the segment
        for number, (start, _) in enumerate(self._segments):
            results, index = Buffer((1, width), "float32", device), _index(number, device)
            self._results.append(sessions.streams.handover(results))
            shared = self._log_price, self._penalties[number]
            rows = [number * (count + 1) + previous for previous in range(count if number else 1)]
            self._runs.append(
                [
                    bound_run(
                        sessions.scorer(),
                        sessions.scorer_ports,
                        [hidden[max(start - 1, 0) % 2], index, _index(row, device), *shared],
                        [results],
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
        totals = self._table(self._results[number].wait(), number)
        self.decisions[start:stop] = totals.argmin(1).tolist()

    def _table(self, flat: np.ndarray, number: int) -> np.ndarray:
        start, stop = self._segments[number]
        return flat.reshape(-1, len(self.actions))[: stop - start]

    @property
    def values(self) -> np.ndarray:
        """Predicted KL of every action of the last token, `[L, A]` nats."""
        results = [handover.wait() for handover in self._results]
        totals, penalties = (
            np.concatenate([self._table(flat, number) for number, flat in enumerate(tables)])
            for tables in (results, [buffer.array for buffer in self._penalties])
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
        self.begin(0)
        self.finish(0)

    def path(self) -> tuple[Action, ...]:
        """The decisions by name."""
        return tuple(self.actions[index] for index in self.decisions)


def _index(value: int, device: Device) -> Buffer:
    buffer = Buffer((1,), "int64", device)
    buffer.write(value)
    return buffer
