"""The scorer at work: decisions for a segment of layers, made before its input exists."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dash_onnx.core.actions import SKIP, Action
from dash_onnx.core.budget import scorer_facts
from dash_onnx.runtime.buffers import Buffer, bound_run
from dash_onnx.runtime.sessions import Sessions
from dash_onnx.runtime.streams import Handover

_NEVER = 1e30  # penalty of an action that must not be chosen


class Scoring:
    """The decisions of one token, segment after segment of layers.

    Attributes:
        actions: that are decided between.
        path: what each layer does; the first segment's decisions hold until the multiplier changes.
        decision_points: per layer, the number of the one before the next segment, or None:
            `begin` before the layer is called, `finish` afterwards.
    """

    def __init__(self, sessions: Sessions, hidden: tuple[Buffer, Buffer]):
        """Binds the scorer once per look.

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
        self._multiplier = 0.0
        self._penalty = Buffer((layers, count), "float32", device)
        self._totals: list[Buffer] = []
        self._results: list[Handover] = []
        self._decided: list[np.ndarray] = []  # views of them, of the segment's layers
        self.path: list[Action] = [self.actions[0]] * layers
        self.decision_points: list[int | None] = [None] * layers
        self._runs: list[Callable[[], object]] = []
        for number, (start, stop) in enumerate(self._segments[1:]):
            total = Buffer((layers, count), "float32", device)
            action = Buffer((layers,), "int64", device)
            self._totals.append(total)
            results = sessions.streams.handover(action)
            self._results.append(results)
            self._decided.append(results.results[start:stop])
            inputs = [hidden[(start - 1) % 2], self._penalty]
            self._runs.append(
                bound_run(
                    sessions.scorer(),
                    sessions.scorer_ports,
                    inputs,
                    [total, action],
                    sessions.streams.run_options,
                )
            )
            self.decision_points[start - 1] = number
        # The first segment's values are the same at every look: what is left without a penalty.
        self.begin(0)
        self.finish(0)
        self._first = self._totals[0].array[: self._segments[0][1]].copy()

    def begin(self, number: int) -> None:
        """Starts a look: once the layer before its segment has its input."""
        results = self._results[number]
        results.offer()
        self._runs[number]()
        results.fetch()

    def finish(self, number: int) -> None:
        """Takes the decisions."""
        self._results[number].wait()
        self._decide(number + 1, self._decided[number])

    def _decide(self, segment: int, indices: np.ndarray) -> None:
        start, stop = self._segments[segment]
        self.path[start:stop] = map(self.actions.__getitem__, indices.tolist())

    @property
    def values(self) -> np.ndarray:
        """Predicted KL of every action of the last token, `[L, A]` nats."""
        penalty = self._penalty.array
        looked = [
            (total.array - penalty)[start:stop]
            for total, (start, stop) in zip(self._totals, self._segments[1:], strict=True)
        ]
        return np.where(penalty < _NEVER, np.concatenate([self._first, *looked]), 0.0)

    def set_multiplier(self, multiplier: float) -> None:
        """Sets nats per `Costs.unit_ms`, and decides for the first segment."""
        if multiplier == self._multiplier:
            return
        self._multiplier = multiplier
        penalty = np.float32(multiplier) * self._costs
        if SKIP in self.actions:
            penalty[0, self.actions.index(SKIP)] = _NEVER
        self._penalty.write(penalty)
        self._decide(0, (self._first + penalty[: len(self._first)]).argmin(1))
