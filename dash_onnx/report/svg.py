"""A few SVG elements, scales and axes: all that the charts of the report need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 860
"""Of a chart in its own units; the page shrinks it as far as it stays readable."""


def tag(name: str, body: str = "", **attributes: object) -> str:
    """An element; `class_` becomes `class`, other underscores hyphens. Floats are rounded."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{written}>{body}</{name}>" if body else f"<{name}{written}/>"


def label(x: float, y: float, content: str, **attributes: object) -> str:
    """A line of text."""
    return tag("text", escape(content), x=x, y=y, **attributes)


def title(content: str) -> str:
    """What a pointer over the enclosing element shows."""
    return tag("title", escape(content))


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def polyline(points: Sequence[tuple[float, float]], class_: str) -> str:
    """A line through points."""
    joined = " ".join(f"{_plain(x)},{_plain(y)}" for x, y in points)
    return tag("polyline", points=joined, class_=class_)


def chart(body: str, width: float, height: float, description: str, class_: str = "") -> str:
    """A whole drawing, in a box that scrolls where the screen is too narrow for it."""
    drawing = tag(
        "svg",
        body,
        viewBox=f"0 0 {_plain(width)} {_plain(height)}",
        role="img",
        aria_label=description,
        style=f"max-width:{_plain(width)}px;min-width:{_plain(min(width, 560))}px",
    )
    return f'<div class="scroll {class_}">{drawing}</div>'


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
        """Position of a value, at most that of the scale's ends."""
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


def decades(values: Sequence[float]) -> tuple[float, float]:
    """The powers of ten around all values above 0."""
    positive = [value for value in values if value > 0] or [1.0]
    low = math.floor(math.log10(min(positive)) + 1e-9)
    high = math.ceil(math.log10(max(positive)) - 1e-9)
    return 10.0**low, 10.0 ** max(high, low + 1)


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """The range of values with some room at both ends."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def axes(x: Scale, y: Scale, x_label: str, y_label: str, percent: bool = False) -> str:
    """Grid, tick labels and the names of both axes.

    Args:
        percent: whether the x axis is of fractions, to be written in percent.
    """
    left, right, bottom, top = x.start, x.end, y.start, y.end
    parts = []
    for value in y.ticks():
        at = y(value)
        parts.append(line(left, at, right, at, "grid"))
        parts.append(label(left - 8, at + 4, number(value), class_="tick", text_anchor="end"))
    for value in x.ticks():
        at = x(value)
        shown = f"{value * 100:g} %" if percent else number(value)
        parts.append(line(at, bottom, at, top, "grid"))
        parts.append(label(at, bottom + 18, shown, class_="tick", text_anchor="middle"))
    middle = (left + right) / 2
    parts.append(line(left, bottom, right, bottom, "axis"))
    parts.append(label(middle, bottom + 38, x_label, class_="name", text_anchor="middle"))
    parts.append(label(left, top - 12, y_label, class_="name"))
    return "".join(parts)


def number(value: float) -> str:
    """A number with as many digits as a reader needs."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.3g}"


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
