"""The picture: speed against quality, one point per contender."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dash_onnx.bench.measure import Result
from dash_onnx.core.atomic import new_file
from dash_onnx.core.contract import FUSED_FOLDER
from dash_onnx.core.errors import DashError

_FLOOR = 1e-5  # nats; the reference itself has none, and the axis is logarithmic
_PLACES = np.array([(0, 11), (0, -11), (11, 0), (-11, 0), (9, 9), (-9, 9), (9, -9), (-9, -9)])
"""Offsets of a number from its point, in typographic points, best first."""


def figure_class() -> Any:
    """Matplotlib's `Figure`.

    Raises:
        DashError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DashError("the picture needs matplotlib: `pip install matplotlib`") from None
    return Figure


def draw(
    results: Sequence[Result],
    path: Path,
    title: str,
    named: Callable[[str], str] = str,
    reference: str = "the full-precision model",
) -> None:
    """Writes the picture; its format follows the name (`.png`, `.svg`).

    Args:
        results: one point each.
        path: file to write.
        title: title above the picture.
        named: maps a contender's name to its label.
        reference: what the KL is to.
    """
    figure = figure_class()(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    shown = [result for result in results if result.kl is not None]
    points = [(result.tokens_per_s, max(result.kl or 0.0, _FLOOR)) for result in shown]
    for number, (result, point) in enumerate(zip(shown, points, strict=True), 1):
        color, marker = _mark(result.name)
        small = f" (KL below {_FLOOR:g})" if (result.kl or 0.0) < _FLOOR else ""
        label = f"{number}  {named(result.name)}{small}"
        axes.plot(*point, color=color, marker=marker, linestyle="", label=label, markersize=6)
    for result in results:
        if result.kl is None:
            axes.plot([], linestyle="", label=f"not shown, KL unknown: {named(result.name)}")
    axes.margins(y=0.08)
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("decoded tokens per second")
    axes.set_ylabel(f"KL to {reference}, nats (better above)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    _number(figure, axes, points)
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:])


def _mark(name: str) -> tuple[str, str]:
    """Color and marker: our models share one color, in our runtime and in others."""
    if name.startswith("dash"):
        return "#1f6f8b", "o"
    fused = FUSED_FOLDER in name.rpartition(" ")[2].split("/")  # as dash-fuse names its folder
    return ("#1f6f8b", "D") if fused else ("#b5651d", "s")


def _number(figure: Any, axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """Writes a number next to each point, where neighbours and numbers leave the most room."""
    figure.draw_without_rendering()  # this finalizes the layout
    taken = [axes.transData.transform(point) * 72 / figure.dpi for point in points]
    for number, point in enumerate(points, 1):
        places = taken[number - 1] + _PLACES
        room = [min(np.linalg.norm(place - other) for other in taken) for place in places]
        best = int(np.argmax(np.minimum(room, np.linalg.norm(_PLACES[0]))))
        taken.append(places[best])
        axes.annotate(
            str(number),
            point,
            xytext=_PLACES[best],
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
        )
