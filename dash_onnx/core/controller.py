"""The controller: it keeps a generation at its budget while the scorer decides its tokens."""

from __future__ import annotations

import math

from dash_onnx.core.actions import Action, ActionPath
from dash_onnx.core.budget import neighbours, reference_ms, scorer_facts
from dash_onnx.core.manifest import Manifest

_SETTLING = 33  # tokens in which the controller makes up for two thirds of a wrong multiplier
_GAINS = (0.2, 1.0)  # of the log multiplier, per token and unit of relative overspending
_STEP = 0.1  # of the log multiplier: each new multiplier costs the runtime new penalties
_REACH = 1.5  # how far beyond the table the controller may push the log multiplier


class Controller:
    """Keeps the mean cost of one generation at its budget by steering the multiplier.

    Works on profiled milliseconds, so a generation does not depend on how busy the machine is.

    Attributes:
        multiplier: nats per `Costs.unit_ms`, for the next token.
    """

    def __init__(
        self, manifest: Manifest, budget: float, multiplier: float, head: Action, graphs: int
    ):
        """Starts at the table's multiplier; for `head` and `graphs` see `Costs.mixed_ms`."""
        self.multiplier = self._first = multiplier
        self._costs = manifest.costs
        self._head, self._graphs = head, graphs
        self._target_ms = budget * reference_ms(manifest)
        points = scorer_facts(manifest).points
        multipliers = [math.log(point.multiplier) for point in points]
        # Where the cost hardly responds to the multiplier, the multiplier has to move further.
        a, b = neighbours(budget, points)
        answer = math.log(b.budget / a.budget)
        wanted = math.log(a.multiplier / b.multiplier) / (_SETTLING * answer) if answer > 0 else 0.0
        self._gain = min(max(wanted, _GAINS[0]), _GAINS[1])
        self._owed = 0.0  # relative overspending of all tokens; what is saved is spent later
        self._offset = 0.0  # of the log multiplier: what this text needs throughout
        self._low = min(multipliers) - _REACH - math.log(multiplier)
        self._high = max(multipliers) + _REACH - math.log(multiplier)

    def spent(self, path: ActionPath) -> None:
        """Records what a token cost."""
        ms = self._costs.token_ms(path, self._head, scored=True, graphs=self._graphs)
        owed = self._owed + ms / self._target_ms - 1
        # Critically damped: the offset follows four times as slowly as the multiplier responds.
        offset = self._offset + self._gain * owed / (4 * _SETTLING)
        moved = self._gain * owed + offset
        if not self._low <= moved <= self._high:  # what no multiplier can make up for is not owed
            return
        self._owed, self._offset = owed, offset
        self.multiplier = self._first * math.exp(_STEP * round(moved / _STEP))
