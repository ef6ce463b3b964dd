"""What the decode loop asks for the action of each layer, pass after pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dash_onnx.core.actions import SKIP, Action, ActionPath, LayerGroup, each_alone, groups_of
from dash_onnx.core.budget import scorer_facts
from dash_onnx.core.controller import Controller
from dash_onnx.core.policy import Policy, ScoredPolicy
from dash_onnx.runtime.backend import AsyncRun
from dash_onnx.runtime.buffers import Buffer
from dash_onnx.runtime.passes import bound_run

if TYPE_CHECKING:
    from dash_onnx.runtime.sequence import SequenceState

_NEVER = 1e30  # penalty of an action that must not be chosen


class Decider:
    """Chooses the action of each layer in the passes of one sequence.

    Attributes:
        head: precision of the LM head.
        groups: the layers, in runs that always share an action, whichever it is.
    """

    head: Action
    groups: tuple[LayerGroup, ...]

    def begin(self) -> None:
        """Before the first layer of a pass."""

    def before(self, layer: int) -> None:
        """Before the group that begins with a layer runs, once its input has been queued."""

    def action(self, layer: int) -> Action:
        """What the group that begins with a layer does."""
        raise NotImplementedError

    def after(self, layer: int) -> None:
        """Once that group has been started."""

    def end(self) -> ActionPath:
        """After the last layer; returns the path that was taken."""
        raise NotImplementedError

    def move(self, sequence: SequenceState) -> None:
        """Between two passes: the next ones run another sequence, which holds the same tokens."""


class FixedPath(Decider):
    """The same path in every pass."""

    def __init__(self, path: ActionPath, head: Action, groups: tuple[LayerGroup, ...] = ()):
        """Takes the action of each layer, and the precision of the LM head.

        Args:
            path: action of each layer.
            head: precision of the LM head.
            groups: the layers that run as one graph; empty takes the longest runs.
        """
        self.path, self.head, self.groups = path, head, groups or groups_of(path)

    def action(self, layer: int) -> Action:
        """See `Decider`."""
        return self.path[layer]

    def end(self) -> ActionPath:
        """See `Decider`."""
        return self.path


class PathSequence(FixedPath):
    """The next path of a series in each pass."""

    def __init__(self, paths: Iterator[ActionPath], layers: int, head: Action):
        """Takes an endless series of paths, their length, and the precision of the LM head."""
        super().__init__((), head)
        self._paths, self.groups = paths, each_alone(layers)

    def begin(self) -> None:
        """See `Decider`; a pass that failed is repeated on its path."""
        self.path = self.path or next(self._paths)

    def end(self) -> ActionPath:
        """See `Decider`."""
        path, self.path = self.path, ()
        return path


class ScoredDecider(Decider):
    """The scorer decides, at each decision point for the layers from there to the next one.

    It reads the input of the layer before the decision point, so that it may run beside that layer:
    a decision never waits for the output of the layer that runs.

    Attributes:
        head: precision of the LM head.
        actions: those it decides between, most expensive first.
    """

    def __init__(
        self,
        sequence: SequenceState,
        head: Action,
        multiplier: float,
        controller: Controller | None = None,
        used: Sequence[AbstractSet[Action]] = (),
        groups: tuple[LayerGroup, ...] = (),
    ):
        """Binds nothing yet: the first pass does, while it holds the device's lock.

        Args:
            sequence: whose tokens it decides for, one at a time.
            head: precision of the LM head.
            multiplier: nats per `Costs.unit_ms`.
            controller: moves the multiplier from token to token; None leaves it as it is.
            used: by layer, the actions that it may take, whatever the multiplier; empty: all.
            groups: runs of layers that always share an action; empty: each layer is alone.

        Raises:
            PolicyError: the bundle has no scorer.
        """
        manifest = sequence.sessions.manifest
        facts = scorer_facts(manifest)
        self.head, self.actions = head, facts.actions
        self._sequence, self._controller, self._given = sequence, controller, multiplier
        self.groups = groups or each_alone(sequence.num_layers)
        self._segments = facts.segments(sequence.num_layers)
        # By layer, the number of the decision point after it: the scorer reads this layer's input.
        self._points: list[int | None] = [None] * sequence.num_layers
        for number, (start, _) in enumerate(self._segments[1:]):
            self._points[start - 1] = number
        self._costs = np.array(manifest.costs.in_units(self.actions), np.float32)
        every = used or [{*self.actions}] * sequence.num_layers
        self._barred = np.array([[a not in own for a in self.actions] for own in every])
        self._barred[0] |= [a == SKIP for a in self.actions]
        self._path = [next(a for a in self.actions if a in own) for own in every]
        self._multiplier: float | None = None
        self._runs: list[AsyncRun] = []  # by decision point, like what they write
        self._totals: list[Buffer] = []

    def _bind(self) -> None:
        sessions, layers = self._sequence.sessions, self._sequence.num_layers
        backend, scorer = sessions.backend, sessions.scorer()
        self._penalty = backend.buffer((layers, len(self.actions)), "float32")
        for start, _ in self._segments[1:]:
            inputs = [self._sequence.hidden[(start - 1) % 2], self._penalty]
            total = backend.buffer(self._penalty.shape, "float32")
            decided = backend.buffer((layers,), "int64")
            outputs = [total, decided]
            run = bound_run(*scorer, inputs, outputs, backend.run_options)
            self._totals.append(total)
            self._runs.append(backend.asynchronous(run, decided))
        # The first segment's values are the same for every token: the totals without a penalty.
        self._runs[0].start()
        self._runs[0].result()
        self._first = self._totals[0].array[: self._segments[0][1]].copy()

    def begin(self) -> None:
        """See `Decider`."""
        if not self._runs:
            self._bind()
        self._set(self._given if self._controller is None else self._controller.multiplier)

    def before(self, layer: int) -> None:
        """See `Decider`."""
        if (point := self._points[layer]) is not None:
            self._runs[point].start()

    def action(self, layer: int) -> Action:
        """See `Decider`."""
        return self._path[layer]

    def after(self, layer: int) -> None:
        """See `Decider`."""
        if (point := self._points[layer]) is not None:
            start, stop = self._segments[point + 1]
            self._decide(start, self._runs[point].result()[start:stop])

    def end(self) -> ActionPath:
        """See `Decider`."""
        path = tuple(self._path)
        if self._controller is not None:
            self._controller.spent(path)
        return path

    def move(self, sequence: SequenceState) -> None:
        """See `Decider`."""
        self._sequence, self._multiplier = sequence, None
        self._runs.clear()
        self._totals.clear()

    @property
    def predicted_kl(self) -> npt.NDArray[np.float32]:
        """The predicted KL of each action of each layer for the last token, `[L, A]` nats."""
        penalty = self._penalty.array
        later = [
            (total.array - penalty)[start:stop]
            for total, (start, stop) in zip(self._totals, self._segments[1:], strict=True)
        ]
        return np.where(penalty < _NEVER, np.concatenate([self._first, *later]), np.float32(0))

    def _decide(self, start: int, indices: np.ndarray) -> None:
        self._path[start : start + len(indices)] = map(self.actions.__getitem__, indices.tolist())

    def _set(self, multiplier: float) -> None:
        """Weights the costs, and decides for the layers before the first decision point."""
        if multiplier == self._multiplier:
            return
        self._multiplier = multiplier
        penalty = np.float32(multiplier) * self._costs
        penalty[self._barred] = _NEVER
        self._penalty.write(penalty)
        self._decide(0, (self._first + penalty[: len(self._first)]).argmin(1))


def decider_of(policy: Policy, sequence: SequenceState) -> Decider:
    """The decider of one generation under a policy."""
    if isinstance(policy, ScoredPolicy):
        used = policy.used(sequence.num_layers, sequence.sessions.manifest.actions)
        return ScoredDecider(
            sequence,
            policy.head,
            policy.multiplier,
            policy.controller(),
            used,
            policy.groups(sequence.num_layers),
        )
    if policy.uniform is not None:
        return FixedPath(policy.uniform, policy.head)
    return PathSequence(policy.paths(), sequence.num_layers, policy.head)
