"""The picture: speed against quality, one point per contender."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dash_onnx.bench.measure import Result
from dash_onnx.errors import DeviceError

_FLOOR = 1e-5  # nats; the reference itself has none, and the axis is logarithmic


def draw(results: Sequence[Result], path: Path, title: str) -> None:
    """Writes the picture; its format follows the name (`.png`, `.svg`).

    Raises:
        DeviceError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DeviceError("the picture needs matplotlib: `pip install matplotlib`") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for ours, colour in ((True, "#1f6f8b"), (False, "#b5651d")):
        points = [
            (result.tokens_per_s, max(result.kl, _FLOOR), result.name)
            for result in results
            if result.kl is not None and result.name.startswith("dash ") == ours
        ]
        if not points:
            continue
        x, y, _ = zip(*points, strict=True)
        axes.scatter(x, y, color=colour, label="dash-onnx" if ours else "peers", zorder=3)
        for speed, kl, name in points:
            text = name.removeprefix("dash ")
            axes.annotate(text, (speed, kl), xytext=(5, 5), textcoords="offset points", fontsize=9)
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("decoded tokens per second")
    axes.set_ylabel("KL to the full-precision model, nats (better above)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=150)
