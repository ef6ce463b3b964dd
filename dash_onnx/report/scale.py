"""Scales of the charts: from values to positions, with round ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Maps values to positions.

    Attributes:
        low: value at `start`.
        high: value at `end`.
        start: position.
        end: position.
        log: whether equal distances are equal ratios; values at or below 0 count as `low`.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Position of a value, clamped to the ends of the scale."""
        low, high = self._inner(self.low), self._inner(self.high)
        share = (self._inner(value) - low) / ((high - low) or 1.0)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values on the scale: about five, or decades where it is logarithmic.

        A logarithmic scale of little more than a decade gets steps within the decade as well.
        """
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.floor(math.log10(self.high))
            factors = (1, 2, 3, 4, 5, 7) if self.high / self.low < 20 else (1,)
            steps = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
            return [v for v in steps if self.low * 0.999 <= v <= self.high * 1.001]
        rough = (self.high - self.low) / 5 or 1.0
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(count * step, 10) for count in range(first, last + 1)]

    def _inner(self, value: float) -> float:
        return math.log(max(value, self.low)) if self.log else value


def decades(values: Iterable[float]) -> tuple[float, float]:
    """The powers of ten around all values above 0."""
    positive = [value for value in values if value > 0] or [1.0]
    low = math.floor(math.log10(min(positive)) + 1e-9)
    high = math.ceil(math.log10(max(positive)) - 1e-9)
    return 10.0**low, 10.0 ** max(high, low + 1)


def padded(values: Iterable[float]) -> tuple[float, float]:
    """The range of values with some margin at both ends; (-1, 1) without values."""
    found = list(values) or [0.0]
    low, high = min(found), max(found)
    room = 0.08 * ((high - low) or abs(high)) or 1.0
    return low - room, high + room
