"""The charts of the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dash_onnx.core.actions import Action
from dash_onnx.core.facts import Training
from dash_onnx.report.facts import Curve, CurvePoint
from dash_onnx.report.stats import Calibration
from dash_onnx.report.svg import (
    WIDTH,
    Scale,
    axes,
    chart,
    decades,
    label,
    line,
    number,
    padded,
    polyline,
    tag,
    title,
)


def speed_quality(curve: Curve) -> str:
    """KL over cost: the policy table, the static front, uniform precisions, presets."""
    everything = [*curve.dash, *curve.static, *curve.uniform.values()]
    low, high = decades([point.kl for point in everything])
    least = min(point.cost for point in everything)
    y = Scale(low, high, 350, 40, log=True)
    # Logarithmic, because most of what matters lies in the cheaper third of the axis.
    x = Scale(0.95 * least, 1.0, 64, WIDTH - 24, log=True)
    parts = [axes(x, y, "mean cost of a token, as a share of the full time", "KL in nats", True)]
    for preset in curve.presets:
        parts.append(line(x(preset.cost), y.start, x(preset.cost), y.end, "mark"))
    for name, points in (("static", curve.static), ("dash", curve.dash)):
        above = [(x(p.cost), y(p.kl)) for p in points if p.kl > 0]
        parts.append(polyline(above, f"line s-{name}"))
        for p in points:
            # A logarithmic axis has no 0: such a point stands hollow on the axis.
            style = f"s-{name}" if p.kl > 0 else f"hollow s-{name}"
            shown = {"cx": x(p.cost), "cy": y(p.kl), "r": 4, "class_": style}
            parts.append(tag("circle", title(_told(name, p)), **shown))
    for action, p in curve.uniform.items():
        across, down = x(p.cost), y(p.kl)
        told = title(_told(f"all {action}", p))
        parts.append(tag("path", told, d=_diamond(across, down, 7), class_="s-uniform"))
        parts.append(label(across + 11, down - 8, action, class_="note"))
    for index, preset in enumerate(curve.presets):
        across, down = x(preset.cost), y(preset.kl)
        told = title(f"{preset.name}: {preset.cost:.1%} of the full time, KL {number(preset.kl)}")
        parts.append(tag("circle", told, cx=across, cy=down, r=8, class_="preset"))
        # Presets may lie close together: each name gets a line of its own.
        parts.append(label(across + 5, y.end + 12 + 16 * index, preset.name, class_="note strong"))
    return chart("".join(parts), WIDTH, 400, "KL over cost")


def _told(name: str, point: CurvePoint) -> str:
    shares = ", ".join(f"{action} {share:.0%}" for action, share in point.shares.items() if share)
    path = f"\n{point.path}" if point.path else ""
    return (
        f"{name}: {point.cost:.1%} of the full time, KL {number(point.kl)}, {point.head} head\n"
        f"{shares}{path}"
    )


def _diamond(x: float, y: float, size: float) -> str:
    return f"M{x:.1f} {y - size:.1f}l{size} {size}l{-size} {size}l{-size} {-size}z"


def layer_bars(layers: Sequence[dict[Action, float]]) -> str:
    """Share of each action per layer, stacked."""
    y = Scale(0.0, 1.0, 220, 20)
    left, step = 48, (WIDTH - 60) / len(layers)
    parts = []
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(line(left, y(value), WIDTH - 12, y(value), "grid"))
        parts.append(
            label(left - 8, y(value) + 4, f"{value:.0%}", class_="tick", text_anchor="end")
        )
    for layer, shares in enumerate(layers):
        told = ", ".join(f"{action} {share:.1%}" for action, share in shares.items())
        done, bars = 0.0, [title(f"layer {layer}: {told}")]
        for action, share in shares.items():
            if share:
                top, bottom = y(done + share), y(done)
                bars.append(
                    tag(
                        "rect",
                        x=left + step * layer + step * 0.08,
                        y=top,
                        width=step * 0.84,
                        height=bottom - top,
                        class_=f"a-{action}",
                    )
                )
            done += share
        parts.append(tag("g", "".join(bars)))
        if layer % max(1, round(len(layers) / 15)) == 0:
            at = left + step * (layer + 0.5)
            parts.append(label(at, 238, str(layer), class_="tick", text_anchor="middle"))
    parts.append(label(WIDTH / 2, 256, "layer", class_="name", text_anchor="middle"))
    return chart("".join(parts), WIDTH, 264, "share of each action per layer")


def learning(training: Training) -> str:
    """Loss, KL and cost after each tenth of the training."""
    panels = (
        ("loss", training.loss, "s-static"),
        ("KL in nats", training.kl, "s-dash"),
        ("cost, share of the full time", training.cost, "s-uniform"),
    )
    drawn = "".join(_learning_panel(*panel) for panel in panels)
    return f'<div class="panels">{drawn}</div>'


def _learning_panel(name: str, values: Sequence[float], style: str) -> str:
    width, height = 280, 200
    y = Scale(*padded(values or [0.0]), height - 46, 34)
    x = Scale(0.0, 1.0, 46, width - 22)
    points = [(x((i + 1) / len(values)), y(value)) for i, value in enumerate(values)]
    dots = "".join(
        tag("circle", title(f"{name} {number(value)}"), cx=at[0], cy=at[1], r=3.5, class_=style)
        for at, value in zip(points, values, strict=True)
    )
    frame = axes(x, y, "share of the training", name, True)
    return chart(frame + polyline(points, f"line {style}") + dots, width, height, name, "small")


def calibration(facts: Calibration, predicted: Sequence[float], realised: Sequence[float]) -> str:
    """Realised KL over predicted KL, both logarithmic: tokens, and the mean of each tenth."""
    size = 420
    shown = [*(b.predicted for b in facts.bins), *(b.realised for b in facts.bins)]
    # A handful of tokens that lost nothing must not squeeze the rest into a corner.
    bottom = min((value for value in shown if value > 0), default=1e-3) / 30
    seen = [value for value in (*predicted, *realised) if value > bottom]
    low, high = decades([*seen, *shown])
    x = Scale(low, high, 60, size - 16, log=True)
    y = Scale(low, high, size - 56, 34, log=True)
    parts = [axes(x, y, "predicted KL in nats", "realised KL in nats")]
    parts.append(line(x(low), y(low), x(high), y(high), "mark"))
    parts += _cloud((x(a), y(b)) for a, b in zip(predicted, realised, strict=True))
    parts.append(polyline([(x(b.predicted), y(b.realised)) for b in facts.bins], "line s-dash"))
    for b in facts.bins:
        at = x(b.predicted)
        told = (
            f"{b.tokens} tokens: predicted {number(b.predicted)}, realised {number(b.realised)} "
            f"(middle half {number(b.low)} to {number(b.high)})"
        )
        parts.append(line(at, y(b.low), at, y(b.high), "whisker"))
        parts.append(tag("circle", title(told), cx=at, cy=y(b.realised), r=5, class_="s-dash"))
    return chart("".join(parts), size, size, "realised over predicted KL", "square")


def _cloud(points: Iterable[tuple[float, float]]) -> list[str]:
    return [tag("circle", cx=x, cy=y, r=2, class_="cloud") for x, y in points]
