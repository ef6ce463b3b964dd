"""The picture: speed against quality, one point per contender."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dash_onnx.bench.measure import Result
from dash_onnx.core.atomic import new_file
from dash_onnx.core.errors import DeviceError

_FLOOR = 1e-5  # nats; the reference itself has none, and the axis is logarithmic


def figure_class() -> Any:
    """Matplotlib's `Figure`.

    Raises:
        DeviceError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DeviceError("the picture needs matplotlib: `pip install matplotlib`") from None
    return Figure


def draw(results: Sequence[Result], path: Path, title: str) -> None:
    """Writes the picture; its format follows the name (`.png`, `.svg`)."""
    figure = figure_class()(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    shown = [result for result in results if result.kl is not None]
    for number, result in enumerate(shown, 1):
        ours = result.name.startswith("dash")
        x, y = result.tokens_per_s, max(result.kl or 0.0, _FLOOR)
        colour, marker = ("#1f6f8b", "o") if ours else ("#b5651d", "s")
        label = f"{number}  {result.name}"
        axes.plot(x, y, color=colour, marker=marker, linestyle="", label=label, markersize=6)
        # Neighbours often share a place: every other number goes below its point.
        offset = (0, 6) if number % 2 else (0, -14)
        axes.annotate(
            str(number), (x, y), xytext=offset, textcoords="offset points", ha="center", fontsize=9
        )
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("decoded tokens per second")
    axes.set_ylabel("KL to the full-precision model, nats (better above)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:])
